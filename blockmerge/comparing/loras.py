"""`lora_similarity`: how alike what two LoRAs do to a model is; and how much it is that one does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from blockmerge.adapters import (
    Adapter,
    Applied,
    Lora,
    LoraLike,
    Module,
    Whereabouts,
    own_bias,
    own_change,
)
from blockmerge.anatomy import Family
from blockmerge.checkpoints import made
from blockmerge.dtypes import size_of
from blockmerge.errors import IncompatibleModelsError, NonFiniteError, counted, listing, shown
from blockmerge.expressions import Expression, Joined, Known, simplify
from blockmerge.streaming import Progress


@dataclass(frozen=True)
class LoraSimilarity:
    """How alike two LoRAs are: cosines from −1 to 1.

    - `similarity`: that of everything they change. It is 1 where neither changes anything.
    - `parts`: {block: cosine}, where blocks were asked for. It is 0 for a block that only one of them
      changes.
    """

    names: tuple[str, str]
    family: str
    similarity: float
    parts: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return asdict(self)


def lora_similarity(
    a: LoraLike,
    b: LoraLike,
    blocks: bool = False,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LoraSimilarity:
    """Return how alike the changes are that two LoRAs make, as a cosine.

    >>> blockmerge.lora_similarity("v1.safetensors", "v2.safetensors").similarity  # doctest: +SKIP
    0.8713

    - `a`, `b`: as `merge_loras` takes them. Strengths and block weights count, as in ``("v2.safetensors", 1,
      "OUTALL")``.
    - `blocks`: give the cosine of every block, too.
    - `threads`, `progress`: as for `merge`.

    The cosine is that of ΔW, in float64. Names, ranks, alphas and kinds may differ, and no model is needed. A
    module that only one of the two has counts as zero in the other.

    Raises `IncompatibleModelsError` for LoRAs of different families, and for kinds that look at the weights:
    DoRA, GLoRA, IA3, OFT and BOFT. Raises `NonFiniteError` for NaN and infinity, `WeightsError` for unknown
    blocks, and `CheckpointError` for files.
    """
    first, second = Lora.of(a), Lora.of(b)
    adapters = _open_both(first, second)
    family = adapters[0].family
    for adapter in adapters:
        _refuse_those_that_look(adapter)
    sides = [
        Applied(adapter, lora.strength, lora.weights(family))
        for adapter, lora in zip(adapters, (first, second), strict=True)
    ]
    sums = _sums_of(sides, family, threads, progress)
    return LoraSimilarity(
        names=(adapters[0].name, adapters[1].name),
        family=family.name,
        similarity=_cosine(list(sums.values())),
        parts={block: _cosine([one]) for block, one in sums.items()} if blocks else {},
        notes=tuple(
            dict.fromkeys(note for one in adapters for note in (*one.notes, *_of_unmet(one)))
        ),  # both may be one file
    )


def squares_of(
    modules: Sequence[Module], threads: int | None = None, progress: Progress | None = None
) -> list[float]:
    """Return ‖ΔW‖² of what each module adds at strength 1, its bias included, in float64.

    All have a target. They are NaN for a module that holds NaN. Raises CheckpointError when one cannot be
    read, and ValueError for one that looks at the weight.
    """
    from blockmerge.comparing.lora_sums import products_of

    places = [(number, terms) for number, one in enumerate(modules) for _, terms in _terms_of(one)]
    products = products_of([[one.change for one in terms] for _, terms in places], threads, progress)
    found = [0.0] * len(modules)
    for (number, terms), inner in zip(places, products, strict=True):
        scales = [one.scale for one in terms]
        found[number] += float(scales @ inner @ scales)
    return found


class _Addend(NamedTuple):
    """What is added to a tensor or a part of one: how often, and what; and the name of the module."""

    scale: float
    change: Expression
    name: str


def _terms_of(module: Module, scale: float = 1.0) -> Iterator[tuple[Whereabouts, list[_Addend]]]:
    """Yield what a module adds to its weight and to its bias, and where these are.

    A bias that its layer does not have is left out, as when it is baked in.
    """
    target = module.target
    assert target is not None, module
    change = own_change(module)
    if change is not None:
        yield Whereabouts(target.ldm, target.place), [_Addend(scale, change, module.name)]
    vectors = own_bias(module)
    if vectors and target.bias is not None:
        yield target.bias, [_Addend(scale * factor, one, module.name) for factor, one in vectors]


Side = Mapping[Whereabouts, Sequence[_Addend]]


class _Sums(NamedTuple):
    """Σa², Σab and Σb² of a block."""

    aa: float
    ab: float
    bb: float


def _sums_of(
    sides: Sequence[Applied], family: Family, threads: int | None, progress: Progress | None
) -> dict[str, _Sums]:
    """The sums of every block that either changes, in the family's order."""
    from blockmerge.comparing.lora_sums import products_of

    blocks: dict[Whereabouts, str] = {}
    a, b = (_by_place(side, blocks) for side in sides)
    a, b = _in_parts(a, b, family, blocks), _in_parts(b, a, family, blocks)
    places = list(dict.fromkeys((*a, *b)))
    terms = [_of_one_width(place, [*a.get(place, ()), *b.get(place, ())], sides, family) for place in places]
    products = products_of([[one.change for one in some] for some in terms], threads, progress)
    each: dict[str, list[_Sums]] = defaultdict(list)
    for place, some, inner in zip(places, terms, products, strict=True):
        scales = [one.scale for one in some]
        of_a = [scale if number < len(a.get(place, ())) else 0.0 for number, scale in enumerate(scales)]
        of_b = [scale - mine for scale, mine in zip(scales, of_a, strict=True)]
        sums = _Sums(float(of_a @ inner @ of_a), float(of_a @ inner @ of_b), float(of_b @ inner @ of_b))
        if not all(map(math.isfinite, sums)):
            raise NonFiniteError(
                f"{' or '.join(shown(side.adapter.name) for side in sides)} holds NaN or infinity "
                f"(or values too large to compare) in {listing(dict.fromkeys(one.name for one in some))}"
            )
        each[blocks[place]].append(sums)
    return {block: _added(each[block]) for block in family.blocks if block in each}


def _by_place(side: Applied, blocks: dict[Whereabouts, str]) -> Side:
    """What a LoRA adds, by where; the block of every place is entered in `blocks`."""
    found: dict[Whereabouts, list[_Addend]] = {}
    for scale, module in side.scaled():
        for place, terms in _terms_of(module, scale):
            assert module.target is not None, module
            blocks[place] = module.target.block
            found[place] = terms
    return found


def _in_parts(side: Side, other: Side, family: Family, blocks: dict[Whereabouts, str]) -> Side:
    """The same, each change of a whole tensor of which the other LoRA changes parts cut into these."""
    cut = {place.ldm for place in other if place.place is not None}
    found: dict[Whereabouts, Sequence[_Addend]] = {}
    for place, terms in side.items():
        if place.place is not None or place.ldm not in cut:
            found[place] = terms
            continue
        for part, origin in family.relation_of(place.ldm).origins_in_diffusers(place.ldm).items():
            where = Whereabouts(place.ldm, part)
            blocks[where] = blocks[place]
            found[where] = [
                one._replace(change=simplify(made(origin, {place.ldm: one.change}, place.ldm)))
                for one in terms
            ]
    return found


def _of_one_width(
    place: Whereabouts, terms: list[_Addend], sides: Sequence[Applied], family: Family
) -> list[_Addend]:
    """The terms of both LoRAs at a place. Those of a first convolution that change fewer input channels than
    others change nothing in the rest.

    Raises IncompatibleModelsError where they are for models of different widths.
    """
    shapes = dict.fromkeys(one.change.shape for one in terms)
    if len(shapes) == 1:
        return terms
    rows = {shape[0] for shape in shapes}
    if place.ldm != family.input_layer or len(rows) > 1:
        each = " and ".join(map(str, map(list, shapes)))
        raise IncompatibleModelsError(
            f"{' and '.join(shown(side.adapter.name) for side in sides)} are for models of different widths: "
            f"{shown(terms[0].name)} changes {each}; give two for models of one width"
        )
    columns = max(shape[1] for shape in shapes)
    return [one._replace(change=_widened(one.change, columns)) for one in terms]


def _widened(change: Expression, columns: int) -> Expression:
    """The same with zeros in the columns that it lacks."""
    rows, own = change.shape
    if own == columns:
        return change
    zeros = bytes(rows * (columns - own) * size_of(change.dtype))
    return Joined((change, Known(zeros, change.dtype, (rows, columns - own))), axis=1)


def _added(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(*map(math.fsum, zip(*sums, strict=True)))


def _cosine(sums: Sequence[_Sums]) -> float:
    aa, ab, bb = _added(sums) if sums else (0.0, 0.0, 0.0)
    if aa <= 0 or bb <= 0:
        return 1.0 if aa <= 0 and bb <= 0 else 0.0
    return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)))


def _open_both(first: Lora, second: Lora) -> tuple[Adapter, Adapter]:
    """Both as of one family: of one that fits several, the other tells which."""
    a = first.open()
    try:
        return a, second.open(a.family)
    except IncompatibleModelsError as error:
        b = second.open()
        try:
            return first.open(b.family), b
        except IncompatibleModelsError:
            raise IncompatibleModelsError(
                f"{shown(a.name)} is a LoRA for {a.family.title}, {shown(b.name)} for {b.family.title}: "
                "they change nothing that both models have; give two of one family"
            ) from error


def _refuse_those_that_look(adapter: Adapter) -> None:
    looking = [one for one in adapter.modules if one.looks_at_weights]
    if looking:
        kinds = sorted({one.kind for one in looking})
        raise IncompatibleModelsError(
            f"{shown(adapter.name)} has {counted(len(looking), 'module')} of {' and '.join(kinds)}, whose "
            "change depends on the model: bake each into it, and compare the results (blockmerge similarity)"
        )


def _of_unmet(adapter: Adapter) -> Iterator[str]:
    if adapter.unmet:
        yield (
            f"{shown(adapter.name)}: {counted(len(adapter.unmet), 'module')} that no table knows are not "
            f"compared ({listing(adapter.unmet)})"
        )
