"""Which family an adapter is made for: the one whose table knows its modules, and whose weights they fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockmerge.adapters.shaping import Shaped
from blockmerge.adapters.targets import Shape, Target, targets_of
from blockmerge.anatomy import FAMILIES, Family
from blockmerge.errors import IncompatibleModelsError, UnknownFamilyError, counted, listing, shown

Modules = Mapping[str, Sequence[Shaped]]
"""{name of a module: the forms that its parts can have}"""


@dataclass(frozen=True)
class Standing:
    """How an adapter stands to a family: {module that it knows: (form, target)}, and {module: what does
    not fit} of these.
    """

    family: Family
    known: Mapping[str, tuple[Shaped, Target]]
    misfits: Mapping[str, str]

    @property
    def is_narrower(self) -> bool:
        """Whether it may be the family's with other widths: hardly anything has the usual ones."""
        return 2 * len(self.misfits) > len(self.known)

    @property
    def alike(self) -> int:
        """How many modules have as many axes as the weights that they change, which is usual."""
        return sum(len(target.shape) == form.axes for form, target in self.known.values())

    @classmethod
    def of(cls, modules: Modules, family: Family, shapes: Mapping[str, Shape] | None = None) -> Standing:
        """Hold modules against a family's layout, or against the `shapes` of a model of it."""
        known: dict[str, tuple[Shaped, Target]] = {}
        misfits: dict[str, str] = {}
        targets = targets_of(family)
        for name, forms in modules.items():
            target = targets.get(name)
            if target is None:
                continue
            faults = [_misfit(form, target, family, shapes) for form in forms]
            fault = None if None in faults else faults[0]
            known[name] = forms[faults.index(fault)], target
            if fault is not None:
                misfits[name] = fault
        return cls(family, known, misfits)


def _misfit(form: Shaped, target: Target, family: Family, shapes: Mapping[str, Shape] | None) -> str | None:
    shape = target.shape if shapes is None else target.shape_in(family, shapes)
    if shape is None:  # the model lacks the tensor: what is not there is not changed
        return None
    faults = [
        form.misfit(one, has_bias=target.bias is not None)
        for one in _shapes_of(target, shape, family, is_known=shapes is not None)
    ]
    return None if None in faults else faults[0]


def _shapes_of(target: Target, shape: Shape, family: Family, *, is_known: bool) -> list[Shape]:
    """The shapes that a module's own weight may have: several for the layer whose input channels tell the
    variant, of which a model may have more than an adapter changes.
    """
    if target.ldm != family.input_layer or len(shape) < 2:
        return [shape]
    channels = {shape[1], family.shared_channels} if is_known else {shape[1], *family.variants}
    return [(shape[0], one, *shape[2:]) for one in sorted(channels, key=lambda one: one != shape[1])]


def fitting(
    modules: Modules,
    metadata: Mapping[str, str],
    name: str,
    family: Family | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> tuple[Standing, tuple[str, ...]]:
    """Return how an adapter stands to its family, or to `family`, and notes on how sure that is.

    The `shapes` are those of a model of `family`.

    Raises IncompatibleModelsError when it is not of `family`, and UnknownFamilyError when it is of none.
    """
    standings = [Standing.of(modules, one, shapes if one is family else None) for one in FAMILIES.values()]
    fits = [one for one in standings if one.known and not one.misfits]
    if not fits and shapes is None and all(one.is_narrower for one in standings if one.known):
        fits = [one for one in standings if one.known]
    most = max((len(one.known) for one in fits), default=0)
    best = [one for one in fits if len(one.known) == most]
    own = next((one for one in standings if one.family is family), None)
    if own is not None and own not in best:
        raise _of_another(own, best, name)
    if not best:
        raise _of_none(standings, list(modules), name)
    found = own or _told(best, metadata)
    return found, tuple(_notes(found, best if own is None else [], name))


def _told(best: Sequence[Standing], metadata: Mapping[str, str]) -> Standing:
    """The one that the metadata names, or whose weights have as many axes as the modules, or the first."""
    version = metadata.get("ss_base_model_version")
    architecture = metadata.get("modelspec.architecture", "")
    for one in best:
        family = one.family
        if version is not None and version in family.adapters.get("base_versions", ()):
            return one
        if family.architecture and architecture.startswith(family.architecture):
            return one
    return max(best, key=lambda one: one.alike)


def _notes(found: Standing, best: Sequence[Standing], name: str) -> Iterator[str]:
    others = [one.family.title for one in best if one is not found and one.alike == found.alike]
    if others:
        yield f"{shown(name)} fits {' and '.join(others)} as well: it is taken for {found.family.title}"
    if found.misfits:
        yield f"the widths of {shown(name)} are not those of {found.family.title}, whose modules it has"


def _of_another(own: Standing, best: Sequence[Standing], name: str) -> IncompatibleModelsError:
    wanted = own.family.title
    if best:
        titles = " or ".join(one.family.title for one in best)
        lacking = listing((module for module in best[0].known if module not in own.known), 1)
        why = _first(own) if own.misfits else f"that has no {lacking}"
        return IncompatibleModelsError(f"{shown(name)} is a LoRA for {titles}, not for {wanted}: {why}")
    if own.misfits:
        return IncompatibleModelsError(f"{shown(name)} does not fit this {wanted} model: {_first(own)}")
    return IncompatibleModelsError(f"{shown(name)} has no module that {wanted} has")


def _of_none(standings: Sequence[Standing], names: Sequence[str], name: str) -> UnknownFamilyError:
    nearest = max(standings, key=lambda one: len(one.known) - len(one.misfits))
    if nearest.known:
        return UnknownFamilyError(
            f"{shown(name)} fits no family that is known, not even {nearest.family.title}: {_first(nearest)}"
        )
    return UnknownFamilyError(
        f"{shown(name)} is a LoRA for a model of no family that is known: its "
        f"{counted(len(names), 'module')} are called {listing(names)}"
    )


def _first(standing: Standing) -> str:
    return listing(standing.misfits.values(), 1, 400)
