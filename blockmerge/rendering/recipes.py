"""Recipes and verifications in the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from blockmerge.errors import counted, listing, shown

if TYPE_CHECKING:
    from blockmerge.merging.again import Recorded
    from blockmerge.merging.verify import Verification


def print_verification(console: Console, found: Verification) -> None:
    """Say whether a file is what its recipe makes."""
    of = f"{shown(found.name)}, made from {listing(found.models, 5)}"
    if found.same:
        console.print(Text(f"the same bits: {of}"))
        return
    console.print(Text(f"not what its recipe makes: {of}"))
    for name, steps in found.different.items():
        console.print(Text(f"- {shown(name)} differs by up to {counted(steps, 'step')}"))
    if found.missing:
        console.print(Text(f"- its recipe makes, too: {listing(found.missing)}"))
    if found.added:
        console.print(Text(f"- not by its recipe: {listing(found.added)}"))


def recipe_text(recorded: Recorded) -> str:
    """The recipe as TOML, with what made it, and the command, as comments."""
    import tomli_w

    from blockmerge.merging.recipe_recorded import for_reading, written_down

    table, _ = written_down(recorded.run)
    read = for_reading(table)
    lines = [f"# {shown(recorded.name)}, by blockmerge {shown(recorded.run.get('version', '?'))}"]
    if command := command_of(read):
        lines.append(f"# {command}")
    return "\n".join([*lines, tomli_w.dumps(read)]).rstrip("\n")


def command_of(table: Mapping[str, Any]) -> str | None:
    """The command for a recipe of one merge, quoted for a shell; None for one of several stages."""
    if "models" not in table or any(isinstance(value, Mapping) for value in table.values()):
        return None
    words = ["blockmerge"]
    options = {key: value for key, value in table.items() if key != "models"}
    method = options.get("method")
    if method in ("convert", "bake"):
        words.append(str(options.pop("method")))
    words += table["models"]
    if method == "bake":
        words += [_lora(one) for one in options.pop("loras", ())]
    for key, value in options.items():
        words += _option(key, value)
    return shlex.join(words)


def _option(key: str, value: Any) -> Iterator[str]:
    option = "-" * 2 + {"loras": "lora"}.get(key, key).replace("_", "-")
    if value is True:
        yield option
    elif key == "loras":
        for one in value:
            yield from ("--lora", _lora(one))
    elif key in ("preset", "preset_beta", "rules") and not isinstance(value, str):
        for one in value:
            yield from (option, str(one))
    elif isinstance(value, (list, tuple)):
        yield from (option, ",".join(map(str, value)))
    else:
        yield from (option, str(value))


def _lora(written: Any) -> str:
    if isinstance(written, str):
        return written
    blocks = written.get("blocks")
    if isinstance(blocks, Mapping):
        blocks = ",".join(f"{block}={weight!r}" for block, weight in blocks.items())
    said = f"{written['file']}:{written.get('strength', 1.0)!r}"
    return said if blocks is None else f"{said}:{blocks}"


_DEEPEST = 20  # merges of merges that are drawn


def print_tree(console: Console, name: str, run: Mapping[str, Any]) -> None:
    """Where a file comes from: its models, and what these come from, as far as they say."""
    console.print(_branch(Tree(Text(f"{shown(name)}: {_how(run)}")), run, run.get("stages") or {}, 0))


def _branch(tree: Tree, run: Mapping[str, Any], stages: Mapping[str, Any], depth: int) -> Tree:
    files = run.get("files") or {}
    recorded = files.get("models") or [None] * len(run.get("models") or ())
    for name, file in zip(run.get("models") or (), recorded, strict=False):
        own = file.get("recipe") if isinstance(file, Mapping) else stages.get(name)
        if isinstance(own, Mapping) and depth < _DEEPEST:
            within = own.get("stages") or {} if isinstance(file, Mapping) else stages
            _branch(tree.add(Text(f"{shown(name)}: {_how(own)}")), own, within, depth + 1)
        else:
            tree.add(Text(shown(name)))
    for lora in run.get("loras") or ():
        tree.add(Text(f"{shown(lora.get('name', '?'))} (LoRA, strength {lora.get('strength', 1)})"))
    return tree


def _how(run: Mapping[str, Any]) -> str:
    """How a merge was made, in a few words."""
    values = set((run.get("weights") or {}).values())
    [*_, only] = values or {None}
    if run.get("preset"):
        how = f" {run['preset']}"
    elif len(values) == 1 and isinstance(only, (int, float)):
        how = f" {only:g}"
    else:
        how = " by block" if values else ""
    return shown(f"{run.get('method', '?')}{how}")
