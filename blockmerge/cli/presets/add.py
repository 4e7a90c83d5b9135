"""`blockmerge presets add`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from blockmerge.cli.console import not_empty
from blockmerge.cli.text_files import write_file


@click.command(short_help="Add one to your own.")
@click.argument("preset", metavar="PRESET")
@click.option(
    "-w",
    "--weights",
    metavar="TEXT",
    callback=not_empty,
    help="The weights of a new preset, as merge takes them.",
)
@click.option(
    "--family",
    metavar="NAME",
    callback=not_empty,
    help="The family whose blocks --weights are for.",
)
@click.option("--name", metavar="NAME", callback=not_empty, help="What it is to be called.")
@click.option("--description", metavar="TEXT", default="", callback=not_empty, help="What it does.")
@click.option("--overwrite", is_flag=True, help="Replace an own preset of that name.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def add(
    preset: str,
    weights: str | None,
    family: str | None,
    name: str | None,
    description: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Add a preset to your own.

    PRESET is a new name (with --weights), a preset file, FILE#NAME, another preset's name, or a merged file
    whose weights it gets.

    \b
      blockmerge presets add soft -w "IN00-IN05=0.3,OUT06-OUT11=0.3"
      blockmerge presets add mbwpresets.txt
      blockmerge presets add "mbwpresets.txt#NAME" --name mine
      blockmerge presets add merged.safetensors --name merged
    """
    from blockmerge.checkpoints import check_output
    from blockmerge.errors import OutputError, reason, shown
    from blockmerge.weights.own_presets import check_new
    from blockmerge.weights.presets import is_shipped

    if weights is None and name is None and not description and _is_preset_file(preset):
        names, target, data = _whole_file(Path(preset))
    else:
        names, target, data = _one_preset(preset, weights, family, name, description)
    check_new(names, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {shown(target.parent)}: {reason(error)}") from error
    given = [Path(preset)] if os.path.exists(preset) else []
    write_file(check_output(target, given, overwrite=overwrite), data, overwrite=overwrite)
    for one in () if quiet else names:
        hiding = ", in place of the one that comes with blockmerge" if is_shipped(one) else ""
        click.echo(f"added {shown(one)}{hiding}: {shown(target)}")


def _is_preset_file(text: str) -> bool:
    from blockmerge.weights.preset_files import SUFFIXES

    return Path(text).suffix.lower() in SUFFIXES


def _whole_file(path: Path) -> tuple[list[str], Path, bytes]:
    """The names of all presets of a file, where it goes, and what is in it."""
    from blockmerge.weights.own_presets import presets_in
    from blockmerge.weights.presets import user_folder

    data, names = presets_in(path)
    return names, user_folder() / path.name, data


def _one_preset(
    preset: str, weights: str | None, family: str | None, name: str | None, description: str
) -> tuple[list[str], Path, bytes]:
    """The name of a preset, where it goes, and what is in its file."""
    from blockmerge.checkpoints import SUFFIXES
    from blockmerge.errors import RecipeError, shown
    from blockmerge.weights import find_preset
    from blockmerge.weights.own_presets import copied_preset, place_of, weights_text, written_preset
    from blockmerge.weights.presets import is_shipped

    if weights is None and family is not None:
        raise RecipeError("--family says whose blocks --weights are for: give --weights, too")
    called = preset if name is None else name
    if weights is not None:
        if name is not None and name != preset:
            raise RecipeError(f"two names are given, {shown(preset)} and {shown(name)}: leave out --name")
        if _is_preset_file(preset) or Path(preset).suffix.lower() in (*SUFFIXES, ".json"):
            raise RecipeError(
                f"with --weights, PRESET is the name of a new preset, and {shown(preset)} is that of a file: "
                "leave out --weights, or the ending of the name"
            )
        data = written_preset(called, weights, family, description=description)
    elif preset.lower().endswith(".safetensors"):
        if name is None:
            raise RecipeError(f"the preset of {shown(preset)} needs a name: give --name")
        found, own = _weights_of(preset)
        source = f"the weights of {os.path.basename(preset)}"
        data = written_preset(name, weights_text(found), own, description=description, source=source)
    else:
        found_preset = find_preset(preset)
        if name is None and is_shipped(preset):
            raise RecipeError(
                f"{shown(preset)} comes with blockmerge: to have a copy of your own, give it another name "
                "with --name"
            )
        called = found_preset.name if name is None else name
        data = copied_preset(found_preset, called, description)
    return [called.strip()], place_of(called), data


def _weights_of(file: str) -> tuple[dict[str, float | None], str]:
    """The weights of the blocks that a merged file was made with, and its family."""
    from blockmerge.errors import RecipeError, shown
    from blockmerge.inspecting import inspect
    from blockmerge.merging.again import Recorded

    run = Recorded.of(file).run
    weights, family = run.get("weights"), inspect(file).family
    if not weights or run.get("weights_beta") or run.get("stages") or family is None:
        raise RecipeError(
            f"{shown(file)} was not made with one weight for each block, so that there is no preset in it"
        )
    return dict(weights), family
