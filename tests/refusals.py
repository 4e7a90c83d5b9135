"""What every refusal has in common: exit code 1, one clear line, no output, no temp file, inputs
unchanged.
"""

from __future__ import annotations

import os
from pathlib import Path

from blockmerge.cli.main import run


def snapshot(folder):
    """Every entry below a folder with its kind and bytes."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        found[str(path)] = (kind, path.read_bytes() if path.is_file() else None)
    return found


def assert_refused(capsys, folder, *arguments, says):
    """Run the command in `folder` and hold that it refuses, leaving everything there as it was. Returns the
    line.
    """
    before = snapshot(folder)
    home = os.getcwd()
    os.chdir(folder)
    try:
        code = run([str(argument) for argument in arguments])
    finally:
        os.chdir(home)
    out, err = capsys.readouterr()
    assert code == 1, (code, out, err)
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    for word in [says] if isinstance(says, str) else says:
        assert word in err, err
    assert snapshot(folder) == before
    return err
