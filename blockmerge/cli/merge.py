"""`blockmerge merge`, which is also what `blockmerge A B …` means."""

from __future__ import annotations

import os
from typing import NoReturn

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console

dtype_option = click.option(
    "--dtype",
    metavar="keep|fp16|bf16|fp32|fp8_…",
    default="keep",
    help="The output's dtype: keep (each tensor keeps its own), fp16, bf16, fp32, fp8_e4m3fn, fp8_e5m2. [default: keep]",
)
naming_option = click.option(
    "--to",
    "naming",
    metavar="ldm|diffusers",
    help="The output's naming: ldm (one file) or diffusers (a folder). [default: the first model's]",
)
ema_option = click.option(
    "--ema", metavar="drop|keep|use", default="drop", help="EMA copies: use makes them the U-Net. [default: drop]"
)
variant_option = click.option(
    "--variant", metavar="NAME", help="Which weights of a diffusers folder: fp16. [default: the plain ones]"
)


@click.command(short_help="Merge two models into a new file.")
@click.argument("models", metavar="A B", nargs=-1, required=True)
@click.option("-o", "--output", metavar="PATH", help="Where the merge goes. [default: <A>+<B>-<preset|weight>.safetensors, here]")
@click.option("-p", "--preset", metavar="NAME", help="A preset's name, a preset file, or FILE#NAME. See `blockmerge presets`.")
@click.option("-w", "--weights", metavar="TEXT", help="How much of B: 0.5, or 26 numbers, or BASE=0,IN00-IN05=0.3,M00=skip.")
@click.option("--set", "changes", metavar="TEXT", multiple=True, help="Change single blocks on top: BASE=0.5,OUT11=1.")
@click.option("-m", "--method", metavar="NAME", default="weighted_sum", show_default=True, help="How two tensors become one.")
@click.option(
    "--vae",
    metavar="auto|a|b|blend|FILE",
    default="auto",
    help="Whose VAE. [default: auto: whole, A's if BASE ≤ 0.5, else B's]",
)
@dtype_option
@naming_option
@ema_option
@variant_option
@click.option(
    "--sdxl-map",
    metavar="name|resolution",
    help="How 26 weights go to SDXL's 20 blocks. [default: the preset's own table, else by name]",
)
@click.option("--device", metavar="cpu|cuda[:N]|auto", default="cpu", show_default=True, help="Where the sums are done.")
@click.option("--threads", metavar="N", type=int, help="How many workers. [default: twice the processors, at most 8]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity instead of refusing them.")
@click.option("--dry-run", is_flag=True, help="Make all checks that need no weights, show the plan, and write nothing.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def merge(
    models: tuple[str, ...],
    output: str | None,
    preset: str | None,
    weights: str | None,
    changes: tuple[str, ...],
    method: str,
    vae: str,
    dtype: str,
    naming: str | None,
    ema: str,
    variant: str | None,
    sdxl_map: str | None,
    device: str,
    threads: int | None,
    overwrite: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge A and B, block by block, into a new .safetensors file or diffusers folder.

    \b
      blockmerge a.safetensors b.safetensors --preset high_res
      blockmerge a.safetensors b.ckpt -w 0.5 --set BASE=0 -o out.safetensors
      blockmerge folder/ b.safetensors --preset low_res -o merged/

    A weight says how much of B a block takes: 0 is all A, 1 is all B. Say it with --preset or with --weights.
    The inputs are never changed, and the output appears complete or not at all.
    """
    from blockmerge.merging.merge import default_output, run
    from blockmerge.merging.merge import dry_run as plan_only
    from blockmerge.merging.recipe import Recipe
    from blockmerge.weights import WeightsRequest

    request = WeightsRequest(preset, weights, ",".join(changes) or None, sdxl_map)
    recipe = Recipe(request, method, vae, dtype, allow_nonfinite, naming, ema)
    if len(models) == 1:
        _refuse_single(models[0])
    recipe.weights.check()
    target = output if output is not None else default_output(recipe, models)
    if dry_run:
        result = plan_only(recipe, models, target, device=device, threads=threads, overwrite=overwrite, variant=variant)
    else:
        with progress_bar("merging", quiet=quiet or as_json) as progress:
            result = run(
                recipe,
                models,
                target,
                device=device,
                threads=threads,
                overwrite=overwrite,
                variant=variant,
                progress=progress,
            )
    if as_json:
        from blockmerge.rendering.json_text import merge_json

        click.echo(merge_json(result))
    elif not quiet:
        from blockmerge.rendering.terminal import print_merge

        print_merge(stdout_console(), result)


def _refuse_single(model: str) -> NoReturn:
    # Also where a mistyped command ends, since `blockmerge X` means `blockmerge merge X`.
    from blockmerge.errors import CheckpointError, RecipeError, shown

    if not os.path.exists(model):
        raise CheckpointError(f"{shown(model)}: no such file or command")
    raise RecipeError("one model given; merging takes two: blockmerge A B --preset high_res")
