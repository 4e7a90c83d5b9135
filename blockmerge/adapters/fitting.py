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
    not fit} of these; `unfit` are those of them that would not fit whatever the widths.
    """

    family: Family
    known: Mapping[str, tuple[Shaped, Target]]
    misfits: Mapping[str, str]
    unfit: Mapping[str, str]

    @property
    def is_of_other_widths(self) -> bool:
        """Whether it may be the family's with other widths: hardly anything has the usual ones."""
        return not self.unfit and 2 * len(self.misfits) > len(self.known)

    @property
    def alike(self) -> int:
        """How many modules have as many axes as the weights that they change, which is usual."""
        return sum(len(target.shape) == form.axes for form, target in self.known.values())

    @classmethod
    def of(cls, modules: Modules, family: Family, shapes: Mapping[str, Shape] | None = None) -> Standing:
        """Hold modules against a family's layout, or against the `shapes` of a model of it."""
        known: dict[str, tuple[Shaped, Target]] = {}
        misfits: dict[str, str] = {}
        unfit: dict[str, str] = {}
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
                if (
                    why := known[name][0].misfit_at_any_width(target.shape, has_bias=_has_bias(target))
                ) is not None:
                    unfit[name] = why
        return cls(family, known, misfits, unfit)


def _misfit(form: Shaped, target: Target, family: Family, shapes: Mapping[str, Shape] | None) -> str | None:
    shape = target.shape if shapes is None else target.shape_in(family, shapes)
    if shape is None:  # the model lacks the tensor: what is not there is not changed
        return None
    faults = [
        form.misfit(one, has_bias=_has_bias(target))
        for one in _shapes_of(target, shape, family, is_known=shapes is not None)
    ]
    return None if None in faults else faults[0]


def _has_bias(target: Target) -> bool:
    return target.bias is not None


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
    # Of a family that knows fewer of the modules than another, it is none, whatever fits.
    most = max(len(one.known) for one in standings)
    fullest = [one for one in standings if one.known and len(one.known) == most]
    best = [one for one in fullest if not one.misfits]
    if not best and shapes is None and all(one.is_of_other_widths for one in standings if one.known):
        best = fullest
    own = next((one for one in standings if one.family is family), None)
    if own is not None and own not in best:
        raise _of_another(own, best, fullest, name)
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
        how = "has the module names of" if found.misfits else "fits"
        yield f"{shown(name)} {how} {' and '.join(others)} as well: it is taken for {found.family.title}"
    if found.misfits:
        yield f"the widths of {shown(name)} are not those of {found.family.title}, whose modules it has"


def _of_another(
    own: Standing, best: Sequence[Standing], fullest: Sequence[Standing], name: str
) -> IncompatibleModelsError:
    wanted = own.family.title
    if not targets_of(own.family):
        return IncompatibleModelsError(f"{shown(name)}: LoRAs cannot be baked into {wanted} models yet")
    others = [one for one in best or fullest if one is not own]
    titles = " or ".join(one.family.title for one in others)
    lacking = [module for one in others[:1] for module in one.known if module not in own.known]
    absent = f"that lacks {len(lacking)} of its modules ({listing(lacking)})"
    if best:
        # Where the widths are other ones in every family, they tell nothing.
        is_told_by_widths = own.misfits and not best[0].misfits
        why = _first(own) if is_told_by_widths else absent
        return IncompatibleModelsError(f"{shown(name)} is a LoRA for {titles}, not for {wanted}: {why}")
    if lacking:
        why = _first(own) if own.misfits else absent
        return IncompatibleModelsError(
            f"{shown(name)} has the module names of {titles}, and is not for this {wanted} model: {why}"
        )
    if own.misfits:
        how = f"is for a {wanted} model of other widths than this one" if own.is_of_other_widths else None
        how = how or f"does not fit this {wanted} model"
        return IncompatibleModelsError(f"{shown(name)} {how}: {_first(own)}")
    return IncompatibleModelsError(f"{shown(name)} has no module that {wanted} has")


def _of_none(standings: Sequence[Standing], names: Sequence[str], name: str) -> UnknownFamilyError:
    nearest = max(standings, key=lambda one: (len(one.known), len(one.known) - len(one.misfits)))
    if nearest.known:
        return UnknownFamilyError(
            f"{shown(name)} has the module names of {nearest.family.title}, and does not fit it: "
            f"{_first(nearest)}"
        )
    return UnknownFamilyError(
        f"{shown(name)} is a LoRA for a model whose LoRAs are not read yet: its modules are called "
        f"{listing(names)}"
    )


def _first(standing: Standing) -> str:
    """The first module that does not fit, and how many others do not."""
    # What fits at no width says more than a width.
    misfits = standing.unfit or standing.misfits
    [first, *others] = misfits.values()
    told = shown(first, 400)
    if not others:
        return told
    verb = "does" if len(others) == 1 else "do"
    return f"{told}; {counted(len(others), 'other module')} {verb} not fit either"
