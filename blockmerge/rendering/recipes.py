"""Recipes and verifications in the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from blockmerge.errors import RecipeError, counted, listing, shown
from blockmerge.merging.planning.run_faults import fault_of_run
from blockmerge.merging.recipe_recorded import for_reading, preset_of, written_down

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

    try:
        table, _ = written_down(recorded.run)
    except RecipeError as error:
        raise RecipeError(f"{shown(recorded.name)}: {error}") from error
    read = for_reading(table)
    try:
        text = tomli_w.dumps(read)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{shown(recorded.name)}: its recipe cannot be written as TOML: {error}") from error
    lines = [f"# {shown(recorded.name)}, by blockmerge {shown(recorded.run.get('version', '?'))}"]
    if command := command_of(read):
        lines.append(f"# {command}")
    return "\n".join([*lines, text]).rstrip("\n")


def command_of(table: Mapping[str, Any]) -> str | None:
    """The command for a recipe of one merge, quoted for a shell; None for one of several stages."""
    if "models" not in table or any(isinstance(one, Mapping) and "models" in one for one in table.values()):
        return None
    words = ["blockmerge"]
    options = {key: value for key, value in table.items() if key not in ("models", "numbers")}
    options |= {f"number {key}": value for key, value in (table.get("numbers") or {}).items()}
    method = options.get("method")
    if method in ("convert", "bake"):
        words.append(str(options.pop("method")))
    words += [f"./{name}" if name.startswith("-") else name for name in table["models"]]
    if method == "bake":
        words += [_lora(one) for one in options.pop("loras", ())]
    for key, value in options.items():
        words += _option(key, value)
    # What somebody's metadata say must be no option, no code, and nothing that a terminal obeys.
    is_safe = all(word.isprintable() for word in words) and ":" not in str(method)
    return shlex.join(words) if is_safe else None


def _option(key: str, value: Any) -> Iterator[str]:
    option = "-" * 2 + {"loras": "lora"}.get(key, key).replace("_", "-")
    if key.startswith("number "):
        numbers = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        yield from ("-" * 2 + "number", f"{key.removeprefix('number ')}={numbers}")
    elif value is True:
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


def print_tree(console: Console, name: str, run: Mapping[str, Any]) -> None:
    """Where a file comes from: its models, and what these come from, as far as they say."""
    console.print(_Branches().of(Tree(Text(f"{shown(name)}: {_how(run)}")), run, run.get("stages") or {}))


class _Branches:
    """Draws each stage, and each model's own recipe, once: what is used again is only named."""

    def __init__(self) -> None:
        self._drawn: list[Mapping[str, Any]] = []

    def of(self, tree: Tree, run: Mapping[str, Any], stages: Mapping[str, Any]) -> Tree:
        """Add a merge's models to a tree."""
        self._drawn.append(run)
        recorded = (run.get("files") or {}).get("models") or [None] * len(run["models"])
        for name, file in zip(run["models"], recorded, strict=False):
            own = file.get("recipe") if file else stages.get(name)
            if not isinstance(own, Mapping) or fault_of_run(own) is not None:
                tree.add(Text(shown(name)))
            elif any(own is one for one in self._drawn):
                tree.add(Text(f"{shown(name)} (as above)"))
            else:
                within = own.get("stages") or {} if file else stages
                self.of(tree.add(Text(f"{shown(name)}: {_how(own)}")), own, within)
        for lora in run.get("loras") or ():
            tree.add(Text(f"{shown(lora['name'])} (LoRA, strength {lora.get('strength', 1)})"))
        return tree


def _how(run: Mapping[str, Any]) -> str:
    """How a merge was made, in a few words."""
    values = set((run.get("weights") or {}).values())
    [*_, only] = values or {None}
    if preset := preset_of(run):
        how = f" {preset}"
    elif len(values) == 1 and isinstance(only, (int, float)):
        how = f" {only:g}"
    else:
        how = " by block" if values else ""
    return shown(f"{run.get('method', '?')}{how}")
