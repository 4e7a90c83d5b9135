"""`blockmerge merge`, which is also what `blockmerge A B …` means."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import click

from blockmerge.cli.carrying_out import carry_out
from blockmerge.cli.console import json_option, not_empty
from blockmerge.cli.numbers import CommandWithNumbers
from blockmerge.cli.opening import opening_options
from blockmerge.cli.output_options import (
    about_options,
    configs_option,
    dtype_option,
    naming_option,
    partial_option,
    threads_option,
)

if TYPE_CHECKING:
    from blockmerge.merging.planning.request import MergeRequest


@click.command(cls=CommandWithNumbers, short_help="Merge models into a new file.")
@click.argument("models", metavar="A B [C …]", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="Where the merge goes. [default: <A>+<B>-<what is done>.safetensors, here]",
)
@click.option(
    "-p",
    "--preset",
    "presets",
    metavar="NAME",
    multiple=True,
    help="A preset: a name, a file, or FILE#NAME. NAME@RATIO, repeated, adds presets up. See "
    "`blockmerge presets`.",
)
@click.option(
    "-w",
    "--weights",
    metavar="TEXT",
    help="How much of B: 0.5, a number for each block, BASE=0,IN00-IN05=0.3,M00=skip, or IN00-IN11=0..1.",
)
@click.option(
    "--set",
    "changes",
    metavar="TEXT",
    multiple=True,
    callback=not_empty,
    help="Change single blocks on top: BASE=0.5,OUT11=1.",
)
@click.option(
    "-m",
    "--method",
    metavar="NAME",
    default="weighted_sum",
    show_default=True,
    help="See `blockmerge methods`.",
)
@click.option(
    "--preset-beta",
    "presets_beta",
    metavar="NAME",
    multiple=True,
    help="Like --preset, for beta: a method's second weight.",
)
@click.option("--weights-beta", metavar="TEXT", help="Like --weights, for beta. [default: 0]")
@click.option(
    "--set-beta",
    "changes_beta",
    metavar="TEXT",
    multiple=True,
    callback=not_empty,
    help="Like --set, for beta.",
)
@click.option(
    "--number",
    "numbers",
    metavar="NAME=VALUE",
    multiple=True,
    help="A number of the method, also of your own methods.",
)
@click.option(
    "--rules",
    metavar="TEXT",
    multiple=True,
    callback=not_empty,
    help="Weights of single tensors: OUT03-OUT05:attn2:0.8, NOT BASE:norm:0. May be repeated; the last that "
    "fits counts.",
)
@click.option(
    "--adjust",
    metavar="NUMBERS",
    default="",
    callback=not_empty,
    help="Detail, contrast, colours: IN,OUT,OUT2,CONT,BRI,COL1,COL2,COL3.",
)
@click.option("--clip", is_flag=True, help="Limit results to what lies between A and B.")
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:STRENGTH[:BLOCKS]]",
    multiple=True,
    help="Add a LoRA to the merge: style.safetensors:0.8:OUTALL. May be repeated.",
)
@partial_option
@click.option(
    "--seed",
    metavar="N",
    type=int,
    default=0,
    show_default=True,
    help="For random weights, and methods that draw random numbers.",
)
@click.option(
    "--vae",
    metavar="auto|a|b|blend|FILE",
    default="auto",
    callback=not_empty,
    help="Whose VAE. [default: auto: whole, A's if BASE ≤ 0.5, else B's]",
)
@click.option(
    "--text-encoder",
    metavar="auto|a|blend",
    default="auto",
    help="Whose text encoders. [default: auto: they follow BASE; A's where a family keeps them as published]",
)
@dtype_option
@naming_option("the first model's; ldm where a folder becomes a .safetensors file")
@opening_options("drop|keep|use")
@configs_option
@click.option(
    "--sdxl-map",
    metavar="name|resolution",
    help="How 26 weights go to SDXL's 20 blocks. [default: the preset's own table, else by name]",
)
@click.option(
    "--device", metavar="cpu|cuda[:N]|auto", default="cpu", show_default=True, help="Where to compute."
)
@threads_option
@about_options
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity instead of refusing them.")
@click.option(
    "--dry-run", is_flag=True, help="Make all checks that need no weights, show the plan, and write nothing."
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def merge(
    models: tuple[str, ...],
    output: str | None,
    presets: tuple[str, ...],
    weights: str | None,
    changes: tuple[str, ...],
    method: str,
    presets_beta: tuple[str, ...],
    weights_beta: str | None,
    changes_beta: tuple[str, ...],
    numbers: dict[str, str],
    rules: tuple[str, ...],
    sdxl_map: str | None,
    seed: int,
    threads: int | None,
    device: str,
    overwrite: bool,
    variant: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    title: str | None,
    author: str | None,
    license: str | None,
    description: str | None,
    **options: Any,
) -> None:
    """Merge A and B block by block into a new .safetensors file or diffusers folder. Some methods take more.

    \b
      blockmerge a.safetensors b.safetensors --preset high_res
      blockmerge a.safetensors b.ckpt -w 0.5 --set BASE=0 -o out.safetensors
      blockmerge folder/ b.safetensors --preset low_res -o merged/
      blockmerge a.safetensors b.safetensors c.safetensors -m add_difference -w 1

    A weight says how much of B a block takes: 0 is all A, 1 is all B. Say it with --preset or with --weights.
    The inputs are never changed, and the output appears complete or not at all.
    """
    _check_command(models[0])
    from blockmerge.merging.default_name import default_output
    from blockmerge.merging.planning.request import make_request
    from blockmerge.merging.recipe import Recipe
    from blockmerge.weights import WeightsRequest

    request = make_request(
        method,
        numbers,
        WeightsRequest(presets, weights, ",".join(changes) or None, sdxl_map, seed=seed),
        WeightsRequest(
            presets_beta, weights_beta, ",".join(changes_beta) or None, sdxl_map, seed=seed, beta=True
        ),
        rules=rules,
        variant=variant,
        about={"title": title, "author": author, "license": license, "description": description},
        **options,
    )
    if len(models) == 1:
        _check_single(models[0], request)
    _check_weights(models, request)
    recipe = Recipe.of(models, request)
    target = output if output is not None else default_output(recipe)
    carry_out(
        recipe,
        target,
        "merging",
        device=device,
        threads=threads,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )


def is_word(text: str) -> bool:
    """Whether a text is like the name of a command, and not the name of anything there is."""
    return re.fullmatch(r"[A-Za-z][\w-]*", text) is not None and not os.path.lexists(text)


def _check_command(model: str) -> None:
    """Refuse a word that stands where a command does, where it is no file either."""
    from blockmerge.errors import CheckpointError, shown

    group = click.get_current_context().parent
    if group is not None and getattr(group, "arg0", None) == model and is_word(model):
        commands = ", ".join(getattr(group.command, "commands", ()))
        raise CheckpointError(f"{shown(model)}: no such file or command (commands are {commands})")


def _check_weights(models: tuple[str, ...], request: MergeRequest) -> None:
    """Refuse a merge without weights, or, before that, one of models that cannot be opened."""
    from blockmerge.errors import WeightsError

    try:
        request.check_weights()
    except WeightsError:
        for model in models:
            request.opening.checkpoint(model)
        raise


def _check_single(model: str, request: MergeRequest) -> None:
    from blockmerge.checkpoints import is_diffusers_folder, model_files
    from blockmerge.errors import CheckpointError, RecipeError, counted, shown

    if not os.path.exists(model):
        raise CheckpointError(f"{shown(model)}: no such file or command")
    if request.merge_method.models == 1:
        return
    if os.path.isdir(model) and not is_diffusers_folder(model) and (files := model_files(model)):
        names = " ".join(shown(file) for file in (files * 2)[:2])
        raise RecipeError(
            f"{shown(model)} is a folder of {counted(len(files), 'model file')}; merging takes the files: "
            f"blockmerge {names} --preset high_res"
        )
    if request.loras:
        raise RecipeError(
            "one model given; LoRAs are put into one model by bake: "
            f"blockmerge bake {shown(model)} {shown(str(request.loras[0].file))} -o OUT"
        )
    raise RecipeError("one model given; merging takes two: blockmerge A B --preset high_res")
