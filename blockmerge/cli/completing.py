"""What the shell completes: presets, methods, families, blocks, words, and files with the right endings.

Loads no torch and reads no weights. Of a model only the header, for its blocks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import click
from click.shell_completion import CompletionItem

from blockmerge.errors import BlockmergeError

WORDS = "blockmerge.words"
"""Where the outermost command keeps in `Context.meta` what was typed after it."""

Items = list[CompletionItem]
Completer = Callable[[click.Context, str], Items]


def files(endings: Sequence[str]) -> Completer:
    """Complete folders, and files that end so."""

    def complete(context: click.Context, incomplete: str) -> Items:
        return _paths(incomplete, tuple(endings))

    return complete


def _paths(incomplete: str, endings: tuple[str, ...]) -> Items:
    """What a path may become; where that is one folder, what is in it as well, so that no shell takes the
    word for complete.
    """
    found = [*_entries(incomplete, endings)]
    inner = found[0].value if len(found) == 1 and found[0].value.endswith("/") else None
    return found if inner is None else [*found, *_entries(inner, endings)]


def _entries(incomplete: str, endings: tuple[str, ...]) -> Iterator[CompletionItem]:
    folder, start = os.path.split(incomplete)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    is_hidden = start.startswith(".")
    begin = incomplete[: len(incomplete) - len(start)]
    for entry in entries:
        if not entry.name.startswith(start) or entry.name.startswith(".") != is_hidden:
            continue
        if os.path.isdir(entry):  # which raises nothing for a link to itself
            yield CompletionItem(f"{begin}{entry.name}/")
        elif entry.name.lower().endswith(endings):
            yield CompletionItem(begin + entry.name)


def words(known: Iterable[str]) -> Completer:
    """Complete some words."""
    every = list(known)
    return lambda context, incomplete: [CompletionItem(one) for one in every if one.startswith(incomplete)]


def presets(context: click.Context, incomplete: str) -> Items:
    """Complete the names of presets, in whatever spelling they begin, and preset files."""
    from blockmerge.weights import presets as every
    from blockmerge.weights.preset_files import SUFFIXES
    from blockmerge.weights.presets import fold

    found = [
        CompletionItem(preset.name, help=preset.description)
        for preset in every()
        if fold(preset.name).startswith(fold(incomplete))
    ]
    return [*found, *_paths(incomplete, SUFFIXES)]


def methods(context: click.Context, incomplete: str) -> Items:
    """Complete the names of methods, with what they are for."""
    from blockmerge.methods import METHODS, purpose_of

    return [
        CompletionItem(name, help=purpose_of(method))
        for name, method in METHODS.items()
        if name.startswith(incomplete)
    ]


def families(context: click.Context, incomplete: str) -> Items:
    """Complete the names of families."""
    from blockmerge.anatomy import FAMILIES

    return [
        CompletionItem(name, help=family.title)
        for name, family in FAMILIES.items()
        if name.startswith(incomplete)
    ]


def components(context: click.Context, incomplete: str) -> Items:
    """Complete what a component is called."""
    from blockmerge.checkpoints import COMPONENT_WORDS

    return words(COMPONENT_WORDS)(context, incomplete)


def blocks(context: click.Context, incomplete: str) -> Items:
    """Complete the names of blocks in a text of weights: those of the first model, as far as it is known."""
    before, piece = _cut(incomplete, ",;")
    if "=" in piece:
        return []
    in_range, start = _cut(piece, "-")
    known = [name for name in _blocks_of(context) if name.startswith(start.upper())]
    return [CompletionItem(f"{before}{in_range}{name}=") for name in known]


def _cut(text: str, marks: str) -> tuple[str, str]:
    """What stands up to the last of some marks, and after it."""
    at = max(text.rfind(mark) for mark in marks) + 1
    return text[:at], text[at:]


def _blocks_of(context: click.Context) -> Sequence[str]:
    from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES
    from blockmerge.checkpoints import Model, open_checkpoint

    # click parses nothing of a line whose last option has no value yet.
    typed: Sequence[str] = context.meta.get(WORDS, ())
    named = next((word for before, word in pairwise(typed) if before == "--family"), None)
    if named is not None and named in FAMILIES:
        return FAMILIES[named].blocks
    first = next((word for word in typed if os.path.exists(word)), None)
    if first is not None:
        try:
            return Model.of(open_checkpoint(first), to_compute=False).anatomy.family.blocks
        except BlockmergeError:
            pass
    return FAMILIES[DEFAULT_FAMILY].blocks


_MODELS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_MODEL, _FOLDER, _OUTPUT = files(_MODELS), files(()), files((".safetensors",))

_BY_NAME: dict[str, Completer] = {
    **dict.fromkeys(("models", "model", "files", "vae", "loras", "lora", "a", "b", "tuned", "base"), _MODEL),
    **dict.fromkeys(("merge", "candidates", "common_base"), files((*_MODELS, ".toml"))),
    **dict.fromkeys(("presets", "presets_beta"), presets),
    **dict.fromkeys(("weights", "weights_beta", "changes", "changes_beta"), blocks),
    "file": files((*_MODELS, ".json")),
    "recipe": files((".toml", ".json")),
    "output": _OUTPUT,
    "fix": _OUTPUT,
    "folder": _FOLDER,
    "preset": files((*_MODELS, ".toml", ".txt", ".tsv", ".csv")),
    "method": methods,
    "family": families,
    "only": components,
}
_OF_COMMAND: dict[tuple[str | None, str], Completer] = {
    ("show", "name"): presets,
    ("methods", "name"): methods,
    ("similarity", "models"): files((*_MODELS, ".toml")),
    ("run", "changes"): words(()),
    ("again", "changes"): words(()),
}
"""How a parameter is completed, by its name, or by that of its command, too."""


def add_completers(command: click.Command) -> None:
    """Let the shell complete the parameters of a command, and of all that are in it."""
    for parameter in command.params:
        if (completer := _completer_of(command, parameter)) is not None:
            parameter.shell_complete = completer  # type: ignore[method-assign, assignment]
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        add_completers(inner)


def _completer_of(command: click.Command, parameter: click.Parameter) -> Completer | None:
    name, metavar = parameter.name or "", parameter.metavar or ""
    own = _OF_COMMAND.get((command.name, name)) or _BY_NAME.get(name)
    if metavar == "FOLDER":
        return _FOLDER
    if "|" not in metavar or name == "only":
        return own if getattr(parameter, "is_flag", False) is False else None
    choices = words(one for one in metavar.split("|") if re.fullmatch(r"[a-z0-9_]+", one))
    if not metavar.endswith("|FILE"):
        return choices
    return lambda context, text: [*choices(context, text), *_MODEL(context, text)]
