"""Results drawn for a terminal with rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from blockmerge.anatomy import FAMILIES
from blockmerge.errors import bytes_text, counted, listing, shown
from blockmerge.methods import purpose_of
from blockmerge.rendering.block_rows import drawn_blocks
from blockmerge.rendering.recipe_in_short import merge_in_short, recipe_in_short
from blockmerge.rendering.tables import print_table
from blockmerge.rendering.u_net import Curve, SharesU, WeightsU

if TYPE_CHECKING:
    from blockmerge.inspecting import CheckResult, Inspection, ListedTensor, Part
    from blockmerge.merging import MergeResult
    from blockmerge.methods import Method
    from blockmerge.weights import Preset

_CURVE = 29  # columns of a curve of 26 blocks, and what stands before it
_DESCRIPTION = 24  # columns that a description has at least
_MOST_LORAS = 6  # of which each has a line
_LONGEST_VALUE = 400  # characters of metadata
_LARGE = 100_000_000  # bytes of a file whose writing has a speed worth telling
_LEAST = 0.0005  # of a weight, that is shown

_SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_merge(console: Console, result: MergeResult) -> None:
    """Print the weights along the U, what was computed, copied and left out, the notes, and the file."""
    for name, stage in result.stages.items():
        _line(console, Text.assemble((shown(name), "bold"), f": {merge_in_short(stage)}"))
    what = f"{result.method} {result.preset}" if result.preset else result.method
    title, kind = FAMILIES[result.family].title_and_kind(result.variant)
    title += "" if kind in ("", "base") else f" {kind}"
    _line(console, Text.assemble((what, "bold"), f" of {' and '.join(map(shown, result.models))} ({title})"))
    if result.weights:
        console.print(Group(Text(), WeightsU(result.weights), Text()))
    if result.weights_beta is not None:
        console.print(Group(Text("beta", "bold"), WeightsU(result.weights_beta), Text()))
    _line(console, Text(", ".join(_counts(result))))
    for note in result.notes:
        _line(console, Text(f"- {note}"))
    if result.change:
        _print_change(console, result)
    if result.dry_run:
        _line(
            console,
            Text(f"dry run: would write {shown(result.output)}, {bytes_text(result.bytes)}"),
        )
    else:
        took = f"  {bytes_text(result.bytes)} in {result.seconds:.2f} s"
        if result.bytes > _LARGE:
            took += f" ({bytes_text(round(result.bytes / max(result.seconds, 1e-9)))}/s)"
        _line(console, Text.assemble((shown(result.output), "bold"), took))


def print_inspection(console: Console, found: Inspection) -> None:
    """Print what is in a checkpoint."""
    _line(console, _title(found, found.why_unknown or ""))
    if found.missing:
        core = FAMILIES[found.family].core_title if found.family else "U-Net"
        lacking = counted(len(found.missing), f"{core} tensor")
        _line(console, Text(f"incomplete: it lacks {lacking} ({listing(found.missing)})"))
    if found.broken_off:
        _line(console, Text(found.broken_off, "bold red"))
    if found.quantised:
        _line(console, Text(f"its weights are quantised: {shown(found.quantised, 400)}"))
    if "ema" in found.components and not {"unet", "transformer", "model"} & found.components.keys():
        _line(console, Text("its U-Net is there as EMA weights only, which are used as the U-Net"))
    for note in found.notes:
        _line(console, Text(f"- {note}"))
    for title, parts in (("component", found.components), ("block", found.blocks)):
        if parts:
            table = _parts(title, parts)
            print_table(console, table)
    if found.hashes:
        for name in ("autov1", "autov2", "autov3", "sha256"):
            _line(console, Text(f"{name:<7} {getattr(found.hashes, name) or '–'}"))
    for key, value in found.metadata.items():
        _line(console, Text.assemble((f"{shown(key)}: ", "bold"), _metadata_text(key, value)))
    _print_tensors(console, found.tensors or {})


def _metadata_text(key: str, value: str) -> str:
    """A recipe in a few words, and the beginning of everything else."""
    if key == "blockmerge.recipe" and (said := recipe_in_short(value)) is not None:
        return said
    beginning = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"
    return shown(beginning, 10 * _LONGEST_VALUE + 1)  # an escaped character is of ten at most


def _print_change(console: Console, result: MergeResult) -> None:
    """Print how large what LoRAs change is in each block, along the U; of each, where there are a few."""
    every = dict.fromkeys(drawn_blocks(result.family, (*result.weights, *result.change)), 0.0)
    _line(console, Text("what the LoRAs change, in percent of the weights: ‖ΔW‖/‖W‖"))
    # What would be shown as 0.0 % has no bar.
    large = {
        block: share if share is None or share >= _LEAST else 0.0 for block, share in result.change.items()
    }
    console.print(SharesU({**every, **large}))
    for lora in result.loras if 1 < len(result.loras) <= _MOST_LORAS else ():
        each = [f"{block} {share:.1%}" for block, share in lora["change"].items() if share is not None]
        said = ", ".join(each) or ("not known" if lora["change"] else "nothing")
        _line(console, Text.assemble((shown(lora["name"]), "bold"), f"  {said}"))


def _print_tensors(console: Console, tensors: Mapping[str, ListedTensor]) -> None:
    """A line for each tensor: its block, dtype, shape and LDM name, and its own where that is another."""
    rows = [
        (one.block or "–", one.dtype, "×".join(map(str, one.shape)) or "1", one.ldm, name)
        for name, one in tensors.items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for *cells, ldm, name in rows:
        aligned = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        own = "" if name == ldm else f"  (here {shown(name, 400)})"
        _line(console, Text.assemble((aligned, "dim"), f"  {shown(ldm, 400)}", (own, "dim")))


def print_check(console: Console, found: CheckResult) -> None:
    """Print what is wrong with a checkpoint, a line for each problem, the worst first."""
    is_quantised = any(problem.code == "quantised_weights" for problem in found.problems)
    _line(console, _title(found, "quantised weights" if is_quantised else "no known U-Net"))
    for note in found.notes:
        _line(console, Text(f"- {note}"))
    code_width = max((len(problem.code) for problem in found.problems), default=0)
    for problem in found.problems:
        takes = "" if problem.bytes is None else f", {bytes_text(problem.bytes)}"
        severity = (f"{problem.severity:<7}  ", _SEVERITY_STYLES[problem.severity])
        _line(console, Text.assemble(severity, f"{problem.code:<{code_width}}  {problem.message}{takes}"))
    for code in found.fixed:
        _line(console, Text.assemble((f"{'fixed':<7}  ", "green"), code))
    counts = Counter(problem.severity for problem in found.problems)
    _line(
        console,
        Text(", ".join(counted(count, severity) for severity, count in counts.items()) or "nothing is wrong"),
    )
    if found.output is not None:
        _line(console, Text(f"wrote {shown(found.output)}: {_repaired(found)}"))


def _repaired(found: CheckResult) -> str:
    """What a repaired copy is rid of, and what is still wrong with it."""
    wrong = ", ".join(dict.fromkeys(problem.code for problem in found.faults))
    if found.fixed:
        return f"fixed {', '.join(found.fixed)}" + (f"; still wrong: {wrong}" if wrong else "")
    return f"none of what is wrong can be repaired: {wrong}" if wrong else "nothing needed repair"


def print_presets(console: Console, presets: Sequence[Preset]) -> None:
    """Print a line for each preset, with its curve; where it is not for U-Nets, with the families it is
    for.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("preset", style="bold", no_wrap=True)
    table.add_column("BASE, IN to OUT", no_wrap=True)
    table.add_column("SDXL", no_wrap=True)
    table.add_column("what it does")
    for preset in presets:
        table.add_row(
            Text(shown(preset.name)),
            _curve(preset),
            "own" if preset.sdxl else "by name" if preset.weights else "-",
            Text(shown(preset.description, 400)),
        )
    names = max((cell_len(shown(preset.name)) for preset in presets), default=0)
    print_table(console, table, names + _CURVE + len("  by name  ") + _DESCRIPTION)


def _curve(preset: Preset) -> RenderableType:
    weights = preset.weights or preset.sdxl
    return Curve(weights) if weights else Text(f"for {', '.join(preset.tables)}")


def print_methods(console: Console, methods: Sequence[Method]) -> None:
    """Print each method with its formula, and what it takes, below what it is for."""
    for number, (purpose, group) in enumerate(groupby(methods, purpose_of)):
        _line(console, Text(("\n" if number else "") + f"{purpose}:"))
        for method in group:
            _line(console, Text.assemble("  ", (method.name, "bold")))
            _line(console, Text(f"    {shown(method.formula, 400)}"))
            taken = (method.count, *method.weights, *(one.name for one in method.numbers))
            _line(console, Text(f"    {', '.join(taken)}", "dim"))


_CUTS = {
    "element": "one element",
    "row": "one row",
    "tensor": "one tensor",
    "model": "all tensors, which are read twice",
}


def print_method(console: Console, method: Method) -> None:
    """Print all there is to know about a method."""
    _line(console, Text(shown(method.name), "bold"))
    _line(console, Text(f"  {shown(method.formula, 400)}"))
    purpose = purpose_of(method)
    facts = [*([("for", purpose[0].lower() + purpose[1:])] if purpose else []), ("models", method.count)]
    for weight, usual in method.weights.items():
        facts.append(
            (weight, "a weight for each block" + ("" if usual is None else f", {usual:g} by default"))
        )
    for number in method.numbers:
        default = "1 each" if number.default is None else f"{number.default:g}"
        about = f"; {shown(number.text, 400)}" if number.text else ""
        facts.append((shown(number.name), f"{number.range}, {default} by default{about}"))
    facts += [("looks at", _CUTS[method.locality]), ("source", shown(method.source, 400))]
    width = max(len(name) for name, _ in facts)
    for name, fact in facts:
        _line(console, Text.assemble("  ", (f"{name:<{width}}", "dim"), f"  {fact}"))


def print_preset(console: Console, preset: Preset) -> None:
    """Print a preset: the U, its table for SDXL where it has one, and where it comes from."""

    def parts() -> Iterator[RenderableType]:
        yield Text(shown(preset.name), "bold")
        if preset.description:
            yield Text(shown(preset.description, 400))
        if preset.weights:
            yield Group(Text(), WeightsU(preset.weights), Text())
        for family, weights in {"SDXL": preset.sdxl, **preset.others}.items():
            if weights:
                yield Group(Text(family, "bold"), WeightsU(weights), Text())
        for family, table in preset.tables_as_written.items():
            yield Group(Text.assemble((family, "bold"), f"  {shown(table, 4000)}"), Text())
        if preset.source:
            yield Text(f"source: {shown(preset.source, 400)}")

    for part in parts():
        console.print(part)


def _title(found: Inspection | CheckResult, unknown: str) -> Text:
    what = unknown
    if found.family:
        title, kind = FAMILIES[found.family].title_and_kind(found.variant or "")
        what = f"{title}, {f'{kind}, ' if kind else ''}{found.naming} names"
    return Text.assemble((shown(found.name), "bold"), f"  {what}")


def _counts(result: MergeResult) -> Iterator[str]:
    counts = result.tensors
    models = [
        (count, shown(name))
        for count, name in zip((counts.from_a, counts.from_b, counts.from_c), result.models, strict=False)
    ]
    if result.method == "convert":
        yield f"{counted(counts.written, 'tensor')} written"
        models = []
    else:
        yield f"{counted(counts.computed, 'tensor')} computed"
    for count, name in (*models, (counts.from_others, "the other models"), (counts.from_vae, "the VAE file")):
        if count:
            yield f"{count} taken from {name}"
    if counts.dropped:
        yield f"{counts.dropped} left out"


def _parts(title: str, parts: Mapping[str, Part]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, style="bold", no_wrap=True)
    for heading in ("tensors", "parameters", "size", "dtypes"):
        table.add_column(heading, justify="left" if heading == "dtypes" else "right", no_wrap=True)
    for name, part in parts.items():
        dtypes = ", ".join(
            f"{dtype} {count}" if len(part.dtypes) > 1 else dtype for dtype, count in part.dtypes.items()
        )
        table.add_row(name, f"{part.tensors:,}", f"{part.parameters:,}", bytes_text(part.bytes), dtypes)
    return table


def _line(console: Console, text: Text) -> None:
    # Paths and notes are copied from the screen, so they are never broken.
    console.print(text, soft_wrap=True)
