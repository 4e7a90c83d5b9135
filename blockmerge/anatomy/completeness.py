"""Names and shapes held against the layouts of real files: what is missing, what is unknown, what has another
shape.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from blockmerge.anatomy.described import Shape, matches
from blockmerge.anatomy.families import FAMILIES
from blockmerge.anatomy.family import Family
from blockmerge.anatomy.names import component_of
from blockmerge.anatomy.renaming import lacking_by_rule, names_by_rule

_POSITIONS = ("position_embedding.weight", "positional_embedding")
# Of the layouts' extents, smaller ones are kernels, channels of pictures and latents, and positions.
_LEAST_WIDTH = 128


@dataclass(frozen=True)
class LayoutGaps:
    """How a component differs from the layout: names, in the layout's order, and {name: expected shape}."""

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshapen: Mapping[str, Shape]


def components_of(family: Family | str) -> tuple[str, ...]:
    """Return the components that a complete file of a family has."""
    return (FAMILIES[family] if isinstance(family, str) else family).components


def layout_gaps(shapes: Mapping[str, Shape], family: Family | str, component: str) -> LayoutGaps:
    """Hold one component of a model, {canonical name: shape}, against the layout of its family.

    Shapes are compared exactly where most widths are the real ones. A narrower or wider model is held against
    itself: each of the layout's widths (320, 640, …) must be one and the same width wherever it occurs. The
    input channels of the U-Net's first convolution are left to `identify`.
    """
    known = FAMILIES[family] if isinstance(family, str) else family
    wanted = {name: one.shape for name, one in known.listed.items() if one.component == component}
    found = {name: shape for name, shape in shapes.items() if component_of(name) == component}
    first = known.input_layer
    if first in wanted and len(found.get(first, ())) == known.signs["ldm"].first_axes:
        rows, _, *kernel = wanted[first]
        wanted[first] = (rows, found[first][1], *kernel)
    for name in wanted:  # a text encoder may read more positions than most
        if name.endswith(_POSITIONS) and len(found.get(name, ())) == 2:
            wanted[name] = (found[name][0], *wanted[name][1:])
    shared = [name for name in wanted if name in found]
    widths = _widths((wanted[name], found[name]) for name in shared)
    heads_vary = bool(widths) and not known.arms
    if widths:  # some widths are those of others by chance
        irregular = known.thin.get("names", {})
        shared = [name for name in shared if not matches(irregular, known.short(name))]
    expected = {name: tuple(widths.get(extent, extent) for extent in wanted[name]) for name in shared}
    return LayoutGaps(
        missing=(
            *(name for name in wanted if name not in found and not matches(known.optional, name)),
            *_lacking_by_rule(known, component, found),
        ),
        unknown=tuple(name for name in found if name not in wanted and not known.knows(name)),
        misshapen={
            name: shape
            for name, shape in expected.items()
            if found[name] != shape and not (heads_vary and _are_alike(found[name], shape))
        },
    )


def _lacking_by_rule(family: Family, component: str, found: Collection[str]) -> Iterator[str]:
    """What a VAE lacks that no layout lists."""
    for one in family.renamings if found and not family.arms else ():
        if component_of(one.ldm) == component == "vae" and names_by_rule(one.rule):
            short = {name.removeprefix(one.ldm) for name in found}
            yield from (one.ldm + name for name in lacking_by_rule(one.rule, short))


def _are_alike(shape: Shape, expected: Shape) -> bool:
    """Whether shapes differ at most in small extents, as heads are narrower in narrow transformers."""
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(one == two or two < _LEAST_WIDTH for one, two in pairs)


def _widths(pairs: Iterable[tuple[Shape, Shape]]) -> dict[int, int]:
    """Return which width of a model stands for each of the layout's, by majority; nothing where most are the
    real ones.
    """
    votes: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for wanted, found in pairs:
        if len(wanted) == len(found):
            for extent, width in zip(wanted, found, strict=True):
                if extent >= _LEAST_WIDTH:
                    votes[extent][width] += 1
    same = sum(widths[extent] for extent, widths in votes.items())
    if 2 * same >= sum(widths.total() for widths in votes.values()):
        return {}
    return {extent: widths.most_common(1)[0][0] for extent, widths in votes.items()}
