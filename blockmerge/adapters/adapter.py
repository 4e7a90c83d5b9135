"""`Adapter`: a file that changes a model, told from the names and shapes of its tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockmerge.adapters.alphas import numbers
from blockmerge.adapters.fitting import Modules, fitting
from blockmerge.adapters.found import Found
from blockmerge.adapters.module import Module, modules_of
from blockmerge.adapters.parts import NOT_READ
from blockmerge.adapters.shaping import Shaped, shaped
from blockmerge.adapters.targets import Shape, Target
from blockmerge.anatomy import FAMILIES, Family
from blockmerge.checkpoints import Checkpoint
from blockmerge.errors import CheckpointError, RecipeError, counted, listing, shown
from blockmerge.expressions import Stored


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a LoRA or one of its relatives is made of.

    >>> adapter = Adapter.of(open_checkpoint("style.safetensors"))  # doctest: +SKIP
    >>> adapter.family.name, adapter.kinds, adapter.modules[0].target.block  # doctest: +SKIP
    ('sdxl', {'lora': 722}, 'IN04')

    `name` is what messages call it. `unmet` are modules that no table knows (their target is None), and
    `embeddings` tensors that travel along. `notes` are sentences for the user.
    """

    source: Checkpoint
    name: str
    family: Family
    modules: tuple[Module, ...]
    unmet: tuple[str, ...]
    embeddings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, int]:
        """{kind: how many modules are of it}, the most frequent first."""
        return dict(Counter(module.kind for module in self.modules).most_common())

    @property
    def blocks(self) -> dict[str, int]:
        """{block: how many modules are in it}, in the family's order."""
        counts = Counter(module.target.block for module in self.modules if module.target is not None)
        return {block: counts[block] for block in self.family.blocks if block in counts}

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        family: Family | str | None = None,
        name: str | None = None,
        *,
        shapes: Mapping[str, Shape] | None = None,
    ) -> Adapter:
        """Look at a file's names and shapes. Of its values, only alphas are read.

        `family` is the one that it has to be of, by default the one that it fits; `shapes` are those of the
        model of that family that it is for, by LDM names, in place of the layout's.

        Raises CheckpointError for what is no adapter or cannot be read as one, IncompatibleModelsError when
        it is not of `family`, and UnknownFamilyError when it is of none.
        """
        name = checkpoint.name if name is None else name
        found = Found.in_file(checkpoint)
        found.check(checkpoint, name)
        checkpoint.check_whole()
        forms = _shaped(found, name)
        standing, notes = fitting(forms, checkpoint.metadata, name, _family(family), shapes)
        _refuse_doubles(standing.known, name)
        modules, more = modules_of(
            checkpoint, {one: standing.known.get(one, (_smallest(forms[one]), None)) for one in forms}, name
        )
        return cls(
            source=checkpoint,
            name=name,
            family=standing.family,
            modules=modules,
            unmet=tuple(module.name for module in modules if module.target is None),
            embeddings=found.embeddings,
            notes=(
                *(f"{shown(name)} {note}" for note in checkpoint.notes),
                *notes,
                *more,
                *_of_embeddings(found, name),
            ),
        )


def _family(family: Family | str | None) -> Family | None:
    if isinstance(family, str) and family not in FAMILIES:
        raise RecipeError(f"unknown family '{shown(family)}': {', '.join(FAMILIES)}")
    return FAMILIES[family] if isinstance(family, str) else family


def _shaped(found: Found, name: str) -> Modules:
    """The forms of all modules. Raises CheckpointError for those whose parts do not belong together."""
    forms: dict[str, Sequence[Shaped]] = {}
    faults: list[str] = []
    for module, parts in found.modules.items():
        one = shaped(parts, _is_set)
        if isinstance(one, str):
            faults.append(one)
        else:
            forms[module] = one
    if faults:
        raise CheckpointError(
            f"{shown(name)} cannot be read as a LoRA: {counted(len(faults), 'module')} of "
            f"{len(found.modules)} cannot be used: {listing(faults, 2, 400)}{_advice(found)}"
        )
    return forms


def _advice(found: Found) -> str:
    """What to do about modules that cannot be used."""
    if any(part in NOT_READ for parts in found.modules.values() for part in parts):
        return (
            "; bake it in with the program that made it, and extract a LoRA from the result (blockmerge lora "
            "extract)"
        )
    return "; download it again, or save it without them"


def _is_set(flag: Stored) -> bool:
    return next(numbers([flag])) != 0


def _smallest(forms: Sequence[Shaped]) -> Shaped:
    """Of the forms that a module can have whose weight is not known, the one of the least rank."""
    return min(forms, key=lambda one: one.rank or 0)


def _refuse_doubles(known: Mapping[str, tuple[Shaped, Target]], name: str) -> None:
    """Raise CheckpointError where two modules change one weight, or a part of it that another has whole."""
    seen: dict[str, dict[str | None, str]] = defaultdict(dict)
    twice: list[str] = []
    for module, (_, target) in known.items():
        before = seen[target.ldm]
        others = [
            other for place, other in before.items() if place == target.place or None in (place, target.place)
        ]
        twice += [f"{shown(other)} and {shown(module)}" for other in others[:1]]
        before.setdefault(target.place, module)
    if twice:
        raise CheckpointError(
            f"{shown(name)} has {counted(len(twice), 'module')} twice, under two names "
            f"({listing(twice, 3, 400)}): nothing says which counts; save it again with one of each"
        )


def _of_embeddings(found: Found, name: str) -> Iterator[str]:
    if found.embeddings:
        yield (
            f"{shown(name)} brings {counted(len(found.embeddings), 'tensor')} of embeddings along, which are "
            f"left aside ({listing(found.embeddings)})"
        )
