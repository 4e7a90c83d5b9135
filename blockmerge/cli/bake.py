"""`blockmerge bake`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.carrying_out import carry_out
from blockmerge.cli.output_options import output_options, partial_option


@click.command(short_help="Put LoRAs into a model for good.")
@click.argument("model", metavar="MODEL")
@click.argument("loras", metavar="FILE[:STRENGTH[:BLOCKS]]…", nargs=-1, required=True)
@click.option("-o", "--output", metavar="PATH", required=True, help="Where the model goes.")
@partial_option
@click.option(
    "--device", metavar="cpu|cuda[:N]|auto", default="cpu", show_default=True, help="Where to compute."
)
@click.option(
    "--dry-run", is_flag=True, help="Make all checks that need no weights, show the plan, and write nothing."
)
@output_options
def bake(
    model: str,
    loras: tuple[str, ...],
    output: str,
    threads: int | None,
    device: str,
    overwrite: bool,
    variant: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Put LoRAs into a model for good, as strongly as they would be at run time.

    \b
      blockmerge bake model.safetensors style.safetensors:0.8 -o styled.safetensors
      blockmerge bake model.safetensors a.safetensors:0.7 b.safetensors:-0.5:"BASE=0,IN04=1" -o c.safetensors

    STRENGTH is 1 by default, and may be negative. BLOCKS multiplies it, block by block. It is a text of
    weights, a list of numbers as for LoRA block weights, or a word such as NONE, ALL, INS or OUTALL.
    """
    from blockmerge.merging.planning.request import make_request
    from blockmerge.merging.recipe import Recipe
    from blockmerge.weights import WeightsRequest

    request = make_request(
        "bake", {}, WeightsRequest(), WeightsRequest(beta=True), loras=loras, variant=variant, **options
    )
    carry_out(
        Recipe.of((model,), request),
        output,
        "baking",
        device=device,
        threads=threads,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
