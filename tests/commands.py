"""Commands run in this process."""

from __future__ import annotations

from blockmerge.cli.main import run


def ok(capsys, *arguments):
    """What a command prints, which is done and has nothing to say on stderr."""
    assert run([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out
