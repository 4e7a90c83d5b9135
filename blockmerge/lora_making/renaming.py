"""What the modules of a LoRA and their tensors are called in the other form of LoRAs, and which have none.

kohya's form (sd-scripts, LyCORIS) has a name for every kind, and alphas; diffusers' (PEFT's) plain LoRAs and
DoRAs whose magnitudes are per output, and no alphas: what they do goes into the second factor.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from blockmerge.adapters import Adapter, Module, Whereabouts, diffusers_names, written_names
from blockmerge.dtypes import FLOAT_DTYPES, precision_of, size_of
from blockmerge.errors import CheckpointError, RecipeError, counted, did_you_mean, listing, shown
from blockmerge.expressions import Expression, Reshaped, simplify
from blockmerge.lora_making.making import check_known
from blockmerge.lora_making.tasks import Shape

FORMS = ("kohya", "diffusers")

_KOHYA = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    "up_bias": "diff_b",
    **{f"{part}{number}": f"{part}{number}.weight" for part in "ab" for number in "12"},
    "ia3_weight": "weight",
}
"""{part: what stands after the module's name}, where that is not the part's own name."""

_DIFFUSERS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "diff_b": "lora_B.bias",
    "dora_scale": "lora_magnitude_vector.weight",
}
_BIASES = ("up_bias", "diff_b")
_ALPHA = "alpha"
_TURNING, _PLAINLY = "oft_", "lora_"


@dataclass(frozen=True)
class Piece:
    """A tensor of the new file: what stands after the module's name, and what it is made of, times a
    `factor`.
    """

    part: str
    tensor: Expression
    shape: Shape
    dtype: str
    factor: float = 1.0


@dataclass(frozen=True)
class Renamed:
    """A module under its new name. `alpha` is written as a number where there is one.

    `recorded` is the alpha that it had before it was put into a factor, which is taken out again where that
    rounds nothing.
    """

    name: str
    old: str
    rank: int | None
    has_kernel: bool
    pieces: tuple[Piece, ...]
    alpha: float | None = None
    alpha_dtype: str = "F32"
    recorded: float | None = None

    @property
    def nbytes(self) -> int:
        """How much is read for it."""
        return sum(piece.tensor.nbytes for piece in self.pieces)

    @property
    def shapes(self) -> dict[str, Shape]:
        """{part: shape} of its tensors."""
        found = {piece.part: piece.shape for piece in self.pieces}
        return found if self.alpha is None else {**found, _ALPHA: ()}

    @property
    def dtypes(self) -> dict[str, str]:
        """{name of a tensor: its dtype}."""
        found = {f"{self.name}.{piece.part}": piece.dtype for piece in self.pieces}
        return found if self.alpha is None else {**found, f"{self.name}.{_ALPHA}": self.alpha_dtype}


def check_form(form: object) -> None:
    """Raise RecipeError for what is no form of LoRAs."""
    if form not in FORMS:
        raise RecipeError(
            f"'{shown(form)}' is not a form of LoRAs (--to){did_you_mean(form, FORMS)}: {' or '.join(FORMS)}"
        )


def renamed(adapter: Adapter, form: str, dtype: str | None, recorded: Mapping[str, float]) -> list[Renamed]:
    """Return all modules of a LoRA as they are in a form, `dtype` being the one that was asked for.

    `recorded` are {name of a module: the alpha that it had before it was converted to what it is}.

    Raises CheckpointError for modules that the form has no place for.
    """
    names = diffusers_names(adapter.family) if form == "diffusers" else written_names(adapter.family)
    _check_names(adapter, names)
    if form == "diffusers":
        _check_kinds(adapter)
        return [_in_diffusers(one, _name_of(one, names), dtype) for one in adapter.modules]
    _check_biases(adapter)
    _check_alphas(adapter)
    return [_in_kohya(one, _name_of(one, names), dtype, recorded.get(one.name)) for one in adapter.modules]


def _name_of(module: Module, names: Mapping[Whereabouts, str]) -> str:
    assert module.target is not None, module
    return names[Whereabouts(module.target.ldm, module.target.place)]


# -- kohya's -------------------------------------------------------------------------------------------------


def _in_kohya(module: Module, name: str, dtype: str | None, recorded: float | None) -> Renamed:
    if module.name.startswith(_TURNING):  # sd-scripts' OFT, whose limits mean something else
        name = _TURNING + name.removeprefix(_PLAINLY)
    is_ranked = module.rank is not None
    pieces = [
        _piece(module, part, _KOHYA.get(part, part), _shape_of(module, part), dtype)
        for part in module.parts
        if part != _ALPHA or not is_ranked
    ]
    found = Renamed(name, module.name, module.rank, _has_kernel(module), tuple(pieces))
    if not is_ranked or module.alpha is None:
        return found
    own = dtype or _dtype_of_alpha(module)
    use = recorded if _can_be_taken_out(module, recorded) else None
    fits = all(_is_exact(one, own) for one in (module.alpha, use) if one is not None)
    return replace(found, alpha=module.alpha, alpha_dtype=own if fits else "F32", recorded=use)


def _check_biases(adapter: Adapter) -> None:
    twice = [one.name for one in adapter.modules if all(part in one.parts for part in _BIASES)]
    if twice:
        raise CheckpointError(
            f"{shown(adapter.name)} has {counted(len(twice), 'module')} with two biases, lora_B.bias and "
            f"diff_b, of which that form has one ({listing(twice)})"
        )


def _check_alphas(adapter: Adapter) -> None:
    """Raise CheckpointError for alphas of 0 in settings, where 0 counts: a tensor's would be taken for the
    rank.
    """
    zeros = [one.name for one in adapter.modules if one.rank is not None and one.alpha == 0]
    if zeros:
        raise CheckpointError(
            f"{shown(adapter.name)} has alpha 0 in the settings of {counted(len(zeros), 'module')}, which "
            f"therefore add nothing ({listing(zeros)}), and kohya's form would take 0 for the rank: save it "
            "again without them"
        )


def _dtype_of_alpha(module: Module) -> str:
    tensor = module.parts.get(_ALPHA, module.parts.get("up"))
    return "F32" if tensor is None or tensor.dtype not in FLOAT_DTYPES else tensor.dtype


def _can_be_taken_out(module: Module, recorded: float | None) -> bool:
    """Whether a factor that alpha was put into can be had without it again: it is a power of two."""
    if recorded is None or module.rank is None or module.factor != 1 or "up" not in module.parts:
        return False
    return is_power_of_two(recorded / module.rank)


def is_power_of_two(number: float) -> bool:
    """Whether a product with a number rounds nothing, as long as it is not too small or too large."""
    return math.frexp(number)[0] == 0.5


def _is_exact(number: float, dtype: str) -> bool:
    """Whether a number, of the size of alphas, is one of a dtype."""
    if size_of(dtype) < size_of("F16") or not 2**-10 <= abs(number) < 2**15:
        return False
    digits = precision_of(dtype).mantissa + 1
    return math.ldexp(math.frexp(number)[0], digits).is_integer()


# -- diffusers' ----------------------------------------------------------------------------------------------


def _in_diffusers(module: Module, name: str, dtype: str | None) -> Renamed:
    pieces = [
        _piece(module, part, _DIFFUSERS[part], _shape_in_diffusers(module, part), dtype)
        for part in module.parts
        if part != _ALPHA
    ]
    pieces = [replace(one, factor=module.factor) if one.part == _DIFFUSERS["up"] else one for one in pieces]
    return Renamed(name, module.name, module.rank, _has_kernel(module), tuple(pieces))


def _check_kinds(adapter: Adapter) -> None:
    """Raise CheckpointError for modules that diffusers does not read, or would read as something else."""
    unfit: dict[str, list[Module]] = defaultdict(list)
    for module in adapter.modules:
        if (why := _unfit(module)) is not None:
            unfit[why].append(module)
    if unfit:
        kinds = [
            f"{len(some)} of {why} ({listing(one.name for one in some[:1])})" for why, some in unfit.items()
        ]
        count = sum(map(len, unfit.values()))
        raise CheckpointError(
            f"{shown(adapter.name)} has {counted(count, 'module')} that diffusers' form has no place for: "
            f"{listing(kinds, 4, 200)}; {_what_to_do(some for some in unfit.values())}"
        )
    for component, modules in _components(adapter):
        decomposed = [one for one in modules if "dora_scale" in one.parts]
        if 0 < len(decomposed) < len(modules):
            raise CheckpointError(
                f"{shown(adapter.name)} has {len(decomposed)} of {counted(len(modules), 'module')} of the "
                f"{component} as DoRA, and diffusers would read all of them so"
            )


def _unfit(module: Module) -> str | None:
    """What a module is that diffusers' form has no place for; None where it has one."""
    if not module.is_product:
        return module.kind
    if "mid" in module.parts:
        return "locon with a core (lora_mid)"
    if "dora_scale" in module.parts and _is_per_input(module):
        return "dora whose magnitudes are per input"
    biases = [part for part in _BIASES if part in module.parts]
    if biases and "dora_scale" in module.parts:
        return "dora with a bias"
    return "lora with two biases" if len(biases) > 1 else None


def _what_to_do(unfit: Iterable[Sequence[Module]]) -> str:
    modules = [one for some in unfit for one in some]
    if any(one.looks_at_weights for one in modules):
        return "bake it into a model, and extract a plain LoRA from that (blockmerge lora extract)"
    if any(one.kind == "norm" or "diff_b" in one.parts for one in modules):
        return "only kohya's form has one"
    return "make a plain LoRA of it first (blockmerge lora merge)"


def _components(adapter: Adapter) -> Iterator[tuple[str, list[Module]]]:
    names = diffusers_names(adapter.family)
    found: dict[str, list[Module]] = defaultdict(list)
    for module in adapter.modules:
        found[_name_of(module, names).partition(".")[0]].append(module)
    yield from found.items()


# -- both ----------------------------------------------------------------------------------------------------


def _check_names(adapter: Adapter, names: Mapping[Whereabouts, str]) -> None:
    """Raise CheckpointError for modules that have no name in the form, or one that another has too."""
    check_known(adapter)
    unnamed = [
        one.name
        for one in adapter.modules
        if one.target is not None and Whereabouts(one.target.ldm, one.target.place) not in names
    ]
    if unnamed:
        raise CheckpointError(
            f"{shown(adapter.name)}: {counted(len(unnamed), 'module')} of {adapter.family.title} have no "
            f"name in that form ({listing(unnamed)})"
        )
    counts = Counter(_name_of(one, names) for one in adapter.modules)
    assert max(counts.values(), default=1) == 1, counts.most_common(1)


def _piece(module: Module, part: str, name: str, shape: Shape, dtype: str | None) -> Piece:
    tensor = module.parts[part]
    own = tensor.dtype if dtype is None or part in (_ALPHA, "on_input") else dtype
    # What is added to a bias is not scaled by alpha under any other name.
    factor = module.factor if part == "up_bias" else 1.0
    return Piece(name, simplify(Reshaped(tensor, shape)), shape, own, factor)


def _shape_of(module: Module, part: str) -> Shape:
    """The shape of a part that has as many axes as the weight that it is for, where that matters."""
    stored = module.parts[part].shape
    assert module.target is not None, module
    kernel = module.target.shape[2:]
    if part == "dora_scale" and not _is_per_input(module):
        return (prod(stored), 1, *[1] * len(kernel))
    if not module.is_product or "mid" in module.parts:
        return stored
    if part == "down":
        return (stored[0], prod(stored[1:]) // prod(kernel), *kernel)
    return (*stored[:2], *[1] * len(kernel)) if part == "up" else stored


def _shape_in_diffusers(module: Module, part: str) -> Shape:
    shape = _shape_of(module, part)
    if part != "dora_scale":
        return shape
    return (1, shape[0], *shape[2:]) if len(shape) > 2 else shape[:1]


def _is_per_input(module: Module) -> bool:
    """Whether a DoRA's magnitudes are those of columns."""
    shape = module.parts["dora_scale"].shape
    return shape[:1] == (1,) and prod(shape) > 1


def _has_kernel(module: Module) -> bool:
    return module.target is not None and prod(module.target.shape[2:]) > 1
