"""The lists of blocks that families have: which of them numbers or names are for, and how messages tell of
them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES, Family
from blockmerge.errors import WeightsError, counted, did_you_mean, shown

BlockList = tuple[str, ...]

DECIMALS = "; decimals are written with a point, as in 0.5"
"""Said where a comma seems to stand for one."""


def family_named(name: Family | str) -> Family:
    """Return a family by its short name, or the one that is given: of a name there may be several, with more
    or fewer blocks. Raises WeightsError, naming all, when there is none.
    """
    if isinstance(name, Family):
        return name
    if name not in FAMILIES:
        raise WeightsError(f"unknown family '{shown(name)}': {', '.join(FAMILIES)}")
    return FAMILIES[name]


def block_lists() -> list[BlockList]:
    """Return every list of blocks that a family has, once: the usual one first."""
    return list(dict.fromkeys(family.blocks for family in (FAMILIES[DEFAULT_FAMILY], *FAMILIES.values())))


def blocks_of_names(names: Collection[object]) -> BlockList:
    """Return the list that has as many blocks as there are names, or else the one that has most of them."""
    known = set(names)
    return max(block_lists(), key=lambda blocks: (len(blocks) == len(known), len(known.intersection(blocks))))


def blocks_of_count(count: int, own: Family | BlockList | None = None, also: Iterable[str] = ()) -> BlockList:
    """Return the list that so many numbers in a row are for, or one more where BASE is left out: a family's
    `own` if they fit, or else the first of its kin that they fit; without one, the first of all.

    Raises WeightsError when they fit none; what is taken `also` is told then.
    """
    lists = block_lists() if own is None else _lists_for(own)
    if own is not None:
        lists = [own.blocks if isinstance(own, Family) else own, *lists]
    for blocks in lists:
        if count in (len(blocks), len(blocks) - _has_base(blocks)):
            return blocks
    first, *others = dict.fromkeys(lists if own is None else lists[1:])
    wanted = [f"{len(first)} are needed{without_base(first)}"]
    wanted += [f"{len(blocks)} for {owners(blocks)}{without_base(blocks)}" for blocks in others]
    wanted += also
    hint = DECIMALS if count == 2 else ""  # 0,5
    raise WeightsError(f"{counted(count, 'weight')} given; {', or '.join(wanted)}{hint}")


def ways_to(family: Family, blocks: BlockList) -> Mapping[str, Mapping[str, str]] | None:
    """Return how the weights of a list of blocks are carried over to a family, by the names of the ways; None
    where they cannot be.
    """
    for source, ways in family.carried.items():
        if FAMILIES[source].blocks == blocks:
            return ways
    return None


def _lists_for(own: Family | BlockList) -> list[BlockList]:
    """The lists whose weights a family takes: those of its kin; by depth, also those of U-Nets."""
    if not isinstance(own, Family):
        return kindred(own)
    if own.arms is not None:
        return kindred(own.blocks)
    usual = [FAMILIES[own.name].blocks] if own.name in FAMILIES else []
    in_arms = [blocks for blocks in block_lists() if any(one.arms for one in _families_of(blocks))]
    return [own.blocks, *usual, *kindred(own.blocks), *in_arms]


def kindred(blocks: BlockList) -> list[BlockList]:
    """Return `blocks` and the lists that weights can be carried over from, or to, the usual one first."""
    own, carried = _families_of(blocks), FAMILIES.values()
    found = [
        other
        for other in block_lists()
        if other == blocks
        or any(ways_to(family, other) for family in own)
        or any(ways_to(family, blocks) for family in carried if family.blocks == other)
    ]
    return found or [blocks]


def owners(blocks: BlockList) -> str:
    """Return whose blocks these are: ``"SD1 and SD2"``, ``"SDXL"``.

    Kin that is called as an earlier family is, as the refiner is called SDXL, goes unsaid.
    """
    first_called: dict[str, Family] = {}
    for family in FAMILIES.values():
        first_called.setdefault(family.called, family)
    own = _families_of(blocks)
    names = [name for name, family in first_called.items() if family.blocks == blocks]
    *all_but_last, last = names or [family.title for family in own] or ["no known family"]
    return f"{', '.join(all_but_last)} and {last}" if all_but_last else last


def spans(blocks: Sequence[str]) -> list[str]:
    """Return the blocks as people write them: ``["BASE", "IN00-IN11", "M00", "OUT00-OUT11"]``."""
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs(blocks)]


def example(blocks: Sequence[str]) -> str:
    """Return a range of these blocks to show how one is written: ``"IN00-IN05"``."""
    run = next((run for run in runs(blocks) if len(run) > 1), list(blocks[:1]))
    return spans(run[:6])[0]


def unknown_block(block: object, of: Family | BlockList) -> WeightsError:
    """The error for a block that a family, or a list of blocks, does not have; it tells which there are."""
    blocks = of.blocks if isinstance(of, Family) else of
    # A block that another family has is no slip of the pen: another block would not be meant.
    near = "" if is_known(block) else did_you_mean(block, blocks)
    whose = "these weights"
    if _families_of(blocks):
        whose = owners(blocks)
    elif isinstance(of, Family):
        whose = of.called
    have = "have" if " and " in whose or whose == "these weights" else "has"
    return WeightsError(
        f"unknown block '{shown(block)}'{near or ':'} {whose} {have} {', '.join(spans(blocks))}"
    )


def is_known(block: object) -> bool:
    """Whether any family has a block of that name."""
    return any(block in blocks for blocks in block_lists())


def without_base(blocks: BlockList) -> str:
    """Return ``" (25 without BASE)"``, or nothing where the list has no BASE."""
    return f" ({len(blocks) - 1} without BASE)" if _has_base(blocks) else ""


def families_of(blocks: BlockList) -> list[Family]:
    """Return the families that have these blocks, in any order; where none has, each of those whose blocks
    are counted, with these.
    """
    found = [family for family in FAMILIES.values() if set(family.blocks) == set(blocks)]
    counted_ones = (family for family in FAMILIES.values() if family.arms is None)
    return found or [replace(family, blocks=blocks) for family in counted_ones]


def _families_of(blocks: BlockList) -> list[Family]:
    return [family for family in FAMILIES.values() if family.blocks == blocks]


def _has_base(blocks: BlockList) -> bool:
    return blocks[:1] == ("BASE",)


def runs(blocks: Sequence[str]) -> Iterator[list[str]]:
    """Yield the blocks in groups of the same letters whose numbers follow one another."""
    run: list[str] = []
    for block in blocks:
        letters, number = _split(block)
        if run and number and _split(run[-1]) == (letters, number - 1):
            run.append(block)
            continue
        if run:
            yield run
        run = [block]
    if run:
        yield run


def _split(block: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.*?)([0-9]+)", block)
    return (match[1], int(match[2])) if match else (block, None)
