"""What names, shapes and dtypes tell: what is missing, unknown, superfluous, or stored oddly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockmerge.adapters import Adapter
from blockmerge.anatomy import (
    TITLES,
    UNET_PREFIX,
    Anatomy,
    Family,
    canonical_name,
    component_of,
    components_of,
    is_leftover,
    is_position_ids,
    is_prediction_marker,
    layout_gaps,
    plain_names_of_ema,
    unwrapped_name,
)
from blockmerge.checkpoints import Checkpoint, Model, Quantised, TensorInfo, lone_model, quantised
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import BlockmergeError, CheckpointError, UnknownFamilyError, counted, listing, shown
from blockmerge.expressions import Expression
from blockmerge.inspecting.problems import Problem

_ODD_DTYPES: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    (
        "integer_weights",
        lambda dtype: dtype not in FLOAT_DTYPES,
        "quantised weights need a program made for them",
    ),
    (
        "float64_weights",
        lambda dtype: dtype == "F64",
        "twice the size of float32 for nothing, and few programs load it",
    ),
    (
        "fp8_weights",
        lambda dtype: dtype.startswith("F8"),
        "programs that do not know 8-bit floats refuse them",
    ),
)


@dataclass(frozen=True)
class Subject:
    """A checkpoint under check.

    `tensors` are LDM name → tensor, `originals` LDM name → name in the file (the first of several). `unused`
    are the file's names of what no loader needs, EMA copies among them. Without a known U-Net `model` is
    None, `why_unknown` says why, and every tensor counts.
    """

    checkpoint: Checkpoint
    model: Model | None
    why_unknown: str | None
    tensors: Mapping[str, TensorInfo | Expression]
    originals: Mapping[str, str]
    unused: tuple[str, ...]
    quantised: Quantised

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Subject:
        """Look at a checkpoint's names and shapes."""
        try:
            model = Model.of(checkpoint, to_compute=False)
        except (CheckpointError, UnknownFamilyError) as error:
            how = quantised(checkpoint)
            originals = {canonical_name(name): name for name in checkpoint.tensors if name not in how.aside}
            found = {canonical: checkpoint.tensors[name] for canonical, name in originals.items()}
            return cls(checkpoint, None, str(error), found, originals, (), how)
        originals = {name: model.names_in_file(name)[0] for name in model.tensors}
        tensors: dict[str, TensorInfo | Expression] = dict(model.tensors)
        # As they are: a view makes matrices of the VAE the convolutions that they should be.
        if model.anatomy.naming == "ldm":
            tensors = {name: checkpoint.tensors[original] for name, original in originals.items()}
        used = {name for one in model.tensors for name in model.names_in_file(one)} | model.quantised.aside
        unused = [name for name in checkpoint.tensors if name not in used and component_of(name) == "ema"]
        unused += [originals[name] for name in model.tensors if is_leftover(name)]
        return cls(checkpoint, model, None, tensors, originals, tuple(unused), model.quantised)

    def in_file(self, names: Iterable[str]) -> tuple[str, ...]:
        """The file's own names of tensors."""
        return tuple(self.originals.get(name, name) for name in names)

    def components(self) -> dict[str, str]:
        """Return {name in the file: component}, told from the canonical name where there is one."""
        told = {original: component_of(name) for name, original in self.originals.items()}
        return {name: told.get(name) or component_of(name) for name in self.checkpoint.tensors}

    def bytes_of(self, names: Iterable[str]) -> int:
        """What tensors take, by their names in the file."""
        return sum(self.checkpoint.tensors[name].nbytes for name in names)


def check_structure(subject: Subject) -> Iterator[Problem]:
    """Yield every problem that the names, shapes and dtypes show."""
    yield from _quantised(subject)
    if subject.quantised.signs:
        return  # what else there is to see of packed weights follows from that
    if subject.model is None:
        yield _instead_of_a_model(subject)
    else:
        yield from _derivatives(subject.model.anatomy)
        yield from _against_layout(subject, subject.model.anatomy)
        yield from _dtypes(subject)
        yield from _superfluous(subject)
    yield from _names(subject)


def _instead_of_a_model(subject: Subject) -> Problem:
    why = subject.why_unknown or ""
    if _is_lora(subject.checkpoint):
        return Problem.of("lora", why)
    try:
        lone = lone_model(subject.checkpoint, subject.checkpoint.name)
    except CheckpointError:  # of integers, which have a problem of their own
        lone = None
    if lone is None:
        return Problem.of("no_unet", why)
    title = lone.anatomy.family.titles[next(iter(lone.components))]
    return Problem.of(
        "component_alone", f"it is a {title} alone: a loader of whole models has to get the rest elsewhere"
    )


def _is_lora(checkpoint: Checkpoint) -> bool:
    """Whether it is a LoRA that can be read."""
    try:
        return bool(Adapter.of(checkpoint).modules)
    except BlockmergeError:
        return False


def _derivatives(anatomy: Anatomy) -> Iterator[Problem]:
    standing = anatomy.standing
    if standing.said:
        added, missing = len(standing.added), len(standing.missing) if standing.is_cut else 0
        said = [f"{added} more"] * bool(added) + [f"{missing} fewer"] * bool(missing)
        core = anatomy.family.core_title
        how = f"whose {core} has {' and '.join(said)} tensors than that of {anatomy.family.title}"
        yield Problem.of("derivative", f"it is {standing.said}, {how}", standing.added)


def _quantised(subject: Subject) -> Iterator[Problem]:
    how = subject.quantised
    if how.fault is not None:
        yield Problem.of("quantised_weights", f"it {how.fault}", how.signs)
    elif how.weights:
        why = "programs that do not know the scales take the codes for weights; convert writes them as bf16"
        yield Problem.of("scaled_fp8", f"{how}: {why}", how.weights)


def _against_layout(subject: Subject, anatomy: Anatomy) -> Iterator[Problem]:
    # A U-Net under names that are not those of the layouts cannot be held against them.
    if not any(name.startswith(UNET_PREFIX) for name in subject.tensors):
        return
    family = anatomy.family
    cut = frozenset(anatomy.standing.missing if anatomy.standing.is_cut else ())
    unused = set(subject.unused)
    shapes = {
        name: info.shape
        for name, info in subject.tensors.items()
        if subject.originals.get(name) not in unused
    }
    present = set(map(component_of, shapes))
    # A VAE that no layout lists is told by its names' rule, where it is there.
    for component in dict.fromkeys((*components_of(family), *(["vae"] if "vae" in present else []))):
        if component not in present:
            yield Problem.of(
                "missing_component",
                f"there is no {family.titles[component]}: a loader of whole models has to get one elsewhere",
            )
            continue
        gaps = layout_gaps(shapes, family, component)
        if missing := [name for name in gaps.missing if name not in cut]:
            yield Problem.of(
                "missing_tensors",
                f"the {family.titles[component]} lacks {counted(len(missing), 'tensor')} "
                f"({listing(missing)})",
                missing,
            )
        # position_ids have a problem of their own, which their shape is a part of.
        # Where layers were cut out, the others may have been trained in other widths.
        misshapen = {
            name: shape
            for name, shape in gaps.misshapen.items()
            if not is_position_ids(name) and not (cut and component == "unet")
        }
        if misshapen:
            said = [
                f"{shown(name)} is {list(shapes[name])}, expected {list(shape)}"
                for name, shape in misshapen.items()
            ]
            yield Problem.of(
                "wrong_shape",
                f"{counted(len(said), 'tensor')} of the {family.titles[component]} with a wrong shape: "
                f"{listing(said, width=300)}",
                subject.in_file(misshapen),
            )
        if gaps.unknown:
            yield _unknown(subject, component, family, gaps.unknown)
    for component in sorted(present - {*components_of(family), "other"}):
        foreign = [name for name in shapes if component_of(name) == component and not family.knows(name)]
        if foreign:
            yield _unknown(subject, component, family, foreign)
    if foreign := [name for name in shapes if component_of(name) == "other" and not _is_known(name, anatomy)]:
        yield Problem.of(
            "foreign_tensors",
            f"{counted(len(foreign), 'tensor')} in no component that blockmerge knows ({listing(foreign)}): "
            "they stay as they are",
            subject.in_file(foreign),
            sum(subject.tensors[name].nbytes for name in foreign),
        )


def _is_known(name: str, anatomy: Anatomy) -> bool:
    return anatomy.family.knows(name) or is_prediction_marker(name)


def _unknown(subject: Subject, component: str, family: Family, names: Sequence[str]) -> Problem:
    found = (
        f"{counted(len(names), 'tensor')} of the {family.titles.get(component, component)} that no "
        f"{family.title} model has"
    )
    nbytes = sum(subject.tensors[name].nbytes for name in names)
    return Problem.of("unknown_tensors", f"{found} ({listing(names)})", subject.in_file(names), nbytes)


def _dtypes(subject: Subject) -> Iterator[Problem]:
    unused = set(subject.unused)
    titles = TITLES if subject.model is None else subject.model.anatomy.family.titles
    weights: defaultdict[str, dict[str, str]] = defaultdict(dict)  # component → {name in the file: dtype}
    for name, info in subject.tensors.items():
        original = subject.originals.get(name, name)
        if original in subject.quantised.weights:
            continue
        if component_of(name) != "other" and not is_position_ids(name) and original not in unused:
            weights[component_of(name)][original] = info.dtype
    for code, is_odd, why in _ODD_DTYPES:
        odd = {
            name: component
            for component, dtypes in weights.items()
            for name, dtype in dtypes.items()
            if is_odd(dtype)
        }
        if odd:
            stored = " and ".join(sorted({weights[component][name] for name, component in odd.items()}))
            where = ", ".join(titles[component] for component in dict.fromkeys(odd.values()))
            yield Problem.of(code, f"{counted(len(odd), 'tensor')} stored as {stored} ({where}): {why}", odd)
    for component, dtypes in weights.items():
        counts = Counter(dtype for dtype in dtypes.values() if dtype in FLOAT_DTYPES).most_common()
        if len(counts) > 1:
            strays = [
                name for name, dtype in dtypes.items() if dtype in FLOAT_DTYPES and dtype != counts[0][0]
            ]
            said = " and ".join(f"{counted(count, 'tensor')} as {dtype}" for dtype, count in counts)
            yield Problem.of(
                "mixed_dtypes", f"the {titles[component]} stores {said} ({listing(strays)})", strays
            )


def _superfluous(subject: Subject) -> Iterator[Problem]:
    copies = plain_names_of_ema(subject.unused)
    if copies:
        unet = {name for name in subject.tensors if component_of(name) == "unet"}
        whole = unet.issubset(copies.values())
        what = (
            f"{counted(len(copies), 'EMA tensor')}: a copy of "
            f"{'the whole U-Net' if whole else 'a part of the U-Net'}"
        )
        yield Problem.of("ema", f"{what} that only training needs", copies, subject.bytes_of(copies))
    if rest := [name for name in subject.unused if name not in copies]:
        what = f"{counted(len(rest), 'tensor')} that no loader needs ({listing(rest)})"
        yield Problem.of("leftovers", what, rest, subject.bytes_of(rest))
    if own := [name for name in subject.in_file(subject.tensors) if component_of(name) == "ema"]:
        yield Problem.of(
            "ema_only", f"the U-Net is there only as EMA weights ({counted(len(own), 'tensor')})", own
        )
    if markers := [name for name in subject.checkpoint.tensors if is_prediction_marker(name)]:
        yield Problem.of(
            "prediction_marker",
            f"marked as of another prediction type than the usual ({listing(markers)})",
            markers,
        )


def _names(subject: Subject) -> Iterator[Problem]:
    names = [name for name in subject.checkpoint.tensors if name not in subject.quantised.aside]
    spellings = Counter(map(canonical_name, names))
    odd = {name: canonical for name in names if (canonical := canonical_name(name)) != name}
    if twice := [name for name, canonical in odd.items() if spellings[canonical] > 1]:
        what = f"{counted(len(twice), 'tensor')} stored a second time under another name ({listing(twice)})"
        yield Problem.of("two_names", what, twice, subject.bytes_of(twice))
    once = {name: canonical for name, canonical in odd.items() if spellings[canonical] == 1}
    if wrapped := [name for name in once if unwrapped_name(name) != name]:
        what = f"{counted(len(wrapped), 'name')} with what training or saving put around them"
        yield Problem.of("wrapped_names", f"{what} ({listing(wrapped)}): few programs find them", wrapped)
    if others := [name for name in once if name not in wrapped and _is_of_another_program(subject, name)]:
        what = f"{counted(len(others), 'tensor')} under names of programs that keep all encoders together"
        yield Problem.of("other_names", f"{what} ({listing(others)}): not every program finds them", others)
    told = {*wrapped, *others}
    old = [
        name
        for name, canonical in once.items()
        if name not in told and component_of(canonical).startswith("text_encoder")
    ]
    if old:
        what = (
            f"{counted(len(old), 'tensor')} of the text encoder "
            f"without text_model. in its name ({listing(old)})"
        )
        yield Problem.of("novelai_names", f"{what}: not every program finds them", old)


def _is_of_another_program(subject: Subject, name: str) -> bool:
    """Whether a name is as Forge and ComfyUI save whole models: text encoders and VAE beside an LDM U-Net."""
    ldm = subject.model is not None and subject.model.anatomy.naming == "ldm"
    return name.startswith("text_encoders.") or (ldm and name.startswith("vae."))
