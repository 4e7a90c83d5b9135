"""A family: an architecture, read from its folder of data (`families/<name>/`).

A folder holds `family.toml`, the description; `layout.tsv`, every tensor of a complete file with its shape,
block and component; and, where the description refers to it, `renaming.tsv`. What is in them is described in
`families/README.md`. The layout is read when it is first needed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from blockmerge.anatomy.origins import NO_PLACE, Origin, Relation, Rows
from blockmerge.anatomy.renaming import Renaming
from blockmerge.errors import RecipeError, UnknownFamilyError, shown

Shape = tuple[int, ...]
NAMINGS = ("ldm", "diffusers")
OUTSIDE = "BASE"
"""The block of all that is not in the U-Net."""

# Names: the models of a merge have the same ones, and each is asked about several times.
_REMEMBERED = 1 << 13


class Listed(NamedTuple):
    """What the layout says of a tensor."""

    shape: Shape
    block: str
    component: str


@dataclass(frozen=True)
class Adjusted:
    """What `adjust` does to a tensor: times 1 + `factor` × the number of that name; or, where there are
    `tones`, plus 0.02 × (the contrast, and the amounts of brightness and three colours times their rows).
    """

    number: str = ""
    factor: float = 0.0
    tones: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Arms:
    """How blocks are drawn: the left ones downwards, `middle` below, the right ones upwards."""

    left: tuple[str, ...]
    middle: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True)
class Signs:
    """How a U-Net of one naming is known, by names without prefix.

    `first` is the tensor that a file must have to be looked at, with some name that begins with `beside`. Its
    extent along axis 1 tells the variant, where it has `first_axes` axes. `highest` is the highest of the
    numbers after the word `numbered`, as 8 in ``input_blocks.8.``; `told` says in words what there is
    instead. Every name in `has` is there and none in `lacks`, where a final dot means all that begin so;
    `axes` are {name: number of axes}.
    """

    first: str
    first_axes: int
    numbered: str
    highest: int
    told: str
    beside: str = ""
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)

    def are_looked_at(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether the names are of this kind at all."""
        return self.first in shapes and _holds(shapes, self.beside)

    def fit(self, shapes: Mapping[str, Shape], *, cut: bool = False) -> bool:
        """Whether this is the family's U-Net, or with `cut` may be one that lacks its highest blocks; widths
        are not looked at.
        """
        highest = self.highest_in(shapes)
        return (
            all(name in shapes for name in self.has)
            and all(name in shapes and len(shapes[name]) == axes for name, axes in self.axes.items())
            and (0 <= highest < self.highest if cut else highest == self.highest)
            and not any(_holds(shapes, name) for name in self.lacks)
        )

    def highest_in(self, names: Iterable[str]) -> int:
        """The highest number that there is, −1 without one."""
        pattern = re.compile(re.escape(self.numbered) + r"\.(\d+)\.")
        found = (pattern.match(name) for name in names)
        # Six digits at most: a hostile name must not make a number of a megabyte.
        return max((int(match[1][:6]) for match in found if match), default=-1)

    def found_instead(self, names: Iterable[str]) -> str:
        """What a U-Net of no known family has, in words."""
        highest = self.highest_in(names)
        return self.told.format(highest=highest, count=highest + 1)


def _holds(names: Mapping[str, Shape], wanted: str) -> bool:
    if wanted.endswith("."):
        return any(name.startswith(wanted) for name in names)
    return not wanted or wanted in names


@dataclass(frozen=True)
class Unmarked:
    """What a variant predicts when no marker says so, and what the user is told then.

    `architectures` are {part of the metadata's modelspec.architecture: prediction}, asked first.
    """

    prediction: str
    note: str
    architectures: Mapping[str, str]


@dataclass(frozen=True)
class Derivative:
    """A model that was made from one of the family by adding tensors, or cutting layers out.

    `adds` are patterns of U-Net names that it has beside the layout's, `beside` of names outside the U-Net,
    and `cut` of all that it lacks, without prefix. `unfit_for_folders` says why no configs of a diffusers
    folder can be made for it, where that is so.
    """

    name: str
    title: str
    adds: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    unfit_for_folders: str = ""

    def has(self, name: str) -> bool:
        """Whether a tensor is one that the family's own models lack."""
        return matches((*self.adds, *self.beside), name)


@dataclass(frozen=True)
class Attention:
    """The layers that the attention similarity looks at, {block: how the names of q, k and v begin}, and what
    to say of it.
    """

    layers: Mapping[str, str]
    note: str | None = None


@dataclass(frozen=True)
class _Beginning:
    """The block of names that begin in one way: its word, and its number = first of `numbers` + the others ×
    those in the name.
    """

    pattern: re.Pattern[str]
    word: str
    numbers: tuple[int, ...]

    def block_of(self, name: str) -> str | None:
        match = self.pattern.match(name)
        if match is None:
            return None
        if not self.numbers:
            return self.word
        first, *each = self.numbers
        counted = sum(times * int(digits[:6]) for times, digits in zip(each, match.groups(), strict=True))
        return f"{self.word}{first + counted:02}"


@dataclass(frozen=True, eq=False)
class Family:
    """An architecture: its short name, its title for people, its blocks, and all that is to be known of it.

    >>> FAMILIES["sdxl"].block_of("model.diffusion_model.out.2.bias")
    'OUT08'

    `blocks` are in the order in which weights are listed, and `arms` how they are drawn; `variants` are
    {input channels: name}; `called` is what messages call it and its kin.

    `carried` says how the weights of another family's blocks become this family's: {that family: {way:
    {block: the block whose weight it takes}}}, the usual way first. `adjusted` says what `adjust` does: {a
    tensor's name in the U-Net: what is done to it}.

    `architecture` is how ModelSpec's names of it begin (https://github.com/Stability-AI/ModelSpec);
    `prefixes` are {naming: {prefix: component}}; `roots` {naming: first words of U-Net names that stand
    without prefix}; `other_prefixes` {what other programs write: what it stands for here}; `prediction`
    {variant: Unmarked}; `optional` and `harmless` patterns of names that may be
    missing or be there beside the layout's; `configs` is what `anatomy.configs` reads, `adapters` what that
    room reads; `aliases` {another program's word: blocks}, `number_lists` {how many numbers: their words}.
    """

    name: str
    title: str
    blocks: tuple[str, ...]
    variants: Mapping[int, str]
    called: str
    arms: Arms | None = None
    carried: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    adjusted: Mapping[str, Adjusted] = field(default_factory=dict)
    architecture: str | None = None
    signs: Mapping[str, Signs] = field(default_factory=dict)
    prefixes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    roots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamings: tuple[Renaming, ...] = ()
    beside_layout: tuple[str, ...] = ()
    other_prefixes: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    derivatives: tuple[Derivative, ...] = ()
    markers: Mapping[str, str] = field(default_factory=dict)
    prediction: Mapping[str, Unmarked] = field(default_factory=dict)
    attention: Attention = Attention({})
    configs: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Any] = field(default_factory=dict)
    unlisted: Mapping[str, Mapping[str, tuple[_Beginning, ...]]] = field(default_factory=dict, repr=False)
    folder: Traversable | None = field(default=None, repr=False)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    number_lists: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Traversable) -> Family:
        """Read a family from its folder, whose name is the family's."""
        data = tomllib.loads(folder.joinpath("family.toml").read_text(encoding="utf-8"))
        names, signs = data["names"], data["signs"]
        arms = Arms(*(tuple(data["blocks"][part]) for part in ("left", "middle", "right")))
        rules = data.get("renaming", [])
        table = _lines(folder, "renaming.tsv") if any(one["rule"] == "table" for one in rules) else []
        completeness, prediction = data.get("completeness", {}), data.get("prediction", {})
        return cls(
            name=folder.name,
            title=data["title"],
            blocks=(OUTSIDE, *arms.left, *arms.middle, *arms.right),
            variants={channels: variant for variant, channels in data["variants"].items()},
            called=data["called"],
            arms=arms,
            carried=data.get("carried", {}),
            adjusted={name: Adjusted(**_frozen(one)) for name, one in data.get("adjusted", {}).items()},
            architecture=data.get("architecture"),
            signs={naming: Signs(**_frozen(signs[naming])) for naming in NAMINGS if naming in signs},
            prefixes={naming: names["prefixes"].get(naming, {}) for naming in NAMINGS},
            roots={naming: tuple(names["roots"].get(naming, ())) for naming in NAMINGS},
            renamings=tuple(Renaming.of(lines=table, **one) for one in rules),
            beside_layout=tuple(names.get("beside_layout", ())),
            other_prefixes=names.get("other_prefixes", {}),
            optional=tuple(completeness.get("optional", ())),
            harmless=tuple(completeness.get("harmless", ())),
            derivatives=tuple(
                Derivative(name, **_frozen(one)) for name, one in data.get("derivatives", {}).items()
            ),
            markers=prediction.get("markers", {}),
            prediction={
                variant: Unmarked(one["unmarked"], one["note"], one.get("architectures", {}))
                for variant, one in prediction.get("variants", {}).items()
            },
            attention=Attention(**data.get("attention", {"layers": {}})),
            configs=data.get("configs", {}),
            adapters=data.get("adapters", {}),
            unlisted={naming: _beginnings(data.get("unlisted", {}).get(naming, {})) for naming in NAMINGS},
            folder=folder,
            aliases=_frozen(data.get("aliases", {})),
            number_lists={int(n): tuple(words.split()) for n, words in data.get("numbers", {}).items()},
        )

    @cached_property
    def listed(self) -> Mapping[str, Listed]:
        """{name: shape, block, component} of every tensor of a complete file, LDM naming."""
        shapes: dict[str, Shape] = {"-": ()}
        found: dict[str, Listed] = {}
        if self.folder is None:
            return found
        for line in _lines(self.folder, "layout.tsv"):
            name, said, block, component = line.split("\t")
            if said not in shapes:
                shapes[said] = tuple(map(int, said.split("x")))
            found[name] = Listed(shapes[said], block, component)
        return found

    @cached_property
    def layout(self) -> Mapping[str, Shape]:
        """{name: shape} of every tensor of a complete file, LDM naming."""
        return {name: listed.shape for name, listed in self.listed.items()}

    @cached_property
    def unet(self) -> Mapping[str, str]:
        """{name: block} of every tensor of a whole U-Net, LDM naming."""
        return {name: one.block for name, one in self.listed.items() if one.component == "unet"}

    def short(self, name: str) -> str:
        """An LDM name without the U-Net's prefix."""
        return name.removeprefix(self.unet_prefix("ldm"))

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The components that a complete file has."""
        return tuple(dict.fromkeys(listed.component for listed in self.listed.values()))

    def unet_prefix(self, naming: str) -> str:
        """What the names of a whole model's U-Net begin with in a naming."""
        return next((p for p, component in self.prefixes.get(naming, {}).items() if component == "unet"), "")

    @cached_property
    def input_layer(self) -> str:
        """The LDM name of the tensor whose second axis are the input channels, which tell the variant."""
        return self.unet_prefix("ldm") + self.signs["ldm"].first

    @property
    def shared_channels(self) -> int:
        """The input channels that all variants have in common: the latent image's."""
        return min(self.variants)

    def block_of(self, name: str) -> str:
        """Return the block of a tensor: the layout's, or for other names that of those that begin alike.

        Raises RecipeError when the family has no such block.
        """
        listed = self.listed.get(name)
        return listed.block if listed is not None else _unlisted_block(self, name)

    def variant_title(self, variant: str) -> str:
        """What people call a variant, of one word or several: ``"base"``, ``"inpainting"``, ``"unCLIP"``."""
        titles = {one.name: one.title for one in self.derivatives}
        return ", ".join(titles.get(word, word) for word in variant.split())

    def scheduler_of(self, marker: str) -> str | None:
        """How the class of a folder's scheduler begins that says what a marker does: None where the settings
        of any do, empty where none does.
        """
        told = next((how for one, how in self.markers.items() if fnmatchcase(marker, one)), "none")
        return {"any": None, "none": ""}.get(told, told)

    def knows(self, name: str) -> bool:
        """Whether a tensor, by its LDM name, is one that the family's models or their derivatives have."""
        return _is_known(self, name)

    def relation_of(self, name: str) -> Relation:
        """Return where a folder keeps the values of an LDM tensor; NO_PLACE where it does not."""
        return _relation(self, name)

    def variant_of(self, shapes: Mapping[str, Shape], naming: str) -> str:
        """Tell the variant (``"base"``, ``"inpainting"``, …) of a U-Net by names without prefix.

        Raises UnknownFamilyError when its first convolution has another shape than any variant's.
        """
        signs = self.signs[naming]
        shape = shapes[signs.first]
        variant = self.variants.get(shape[1]) if len(shape) == signs.first_axes else None
        if variant is None:
            raise UnknownFamilyError(
                f"has a first convolution ({signs.first}) of shape {list(shape)}, "
                f"which no {self.name} model has"
            )
        return variant

    def origins(self, names: Iterable[str], naming: str, wanted: str) -> dict[str, Origin]:
        """Return {name in the naming `wanted`: how it is made} for tensors of a `naming`.

        Into LDM, tensors of a folder that are unknown to it keep their names, and so do the parts of a tensor
        of which others are missing; what stands under a folder's prefix with an LDM name gets LDM's prefix;
        and the VAE's attention gets the axes of convolutions. Into diffusers, what has no place in a folder
        is left out; names of a folder's own stay, but for those that an LDM tensor gets.
        """
        if wanted == "ldm":
            return self._in_ldm(names)
        if naming == "ldm":
            return self._in_diffusers(names)
        return {name: Origin((Rows(name),)) for name in names}

    @cached_property
    def _original_names(self) -> Mapping[str, str]:
        """{diffusers name: LDM name} of every tensor that both namings have."""
        names = (*self.listed, *self.beside_layout)
        return {place: name for name in names for place in self.relation_of(name).diffusers}

    @cached_property
    def _as_listed(self) -> Mapping[str, Origin]:
        """{LDM name: the tensor of that name}, of all that are listed: most that a file has."""
        return {
            name: Origin((Rows(name),), axes=4 if self.relation_of(name).squeezed else None)
            for name in self.listed
        }

    def _in_ldm(self, names: Iterable[str]) -> dict[str, Origin]:
        have = dict.fromkeys(names)
        as_listed = self._as_listed
        own = {name: self.usual_name(name) for name in have if name not in as_listed}
        named = {usual: name for name, usual in reversed(own.items())} | {name: name for name in have}
        found: dict[str, Origin] = {}
        # What has LDM's own name goes before what another naming calls the same.
        for name in sorted(have, key=lambda name: "/" in name):
            if name in as_listed:
                found.setdefault(name, as_listed[name])
                continue
            usual = own[name]
            ldm = self._original_names.get(usual, usual)
            relation = self.relation_of(ldm)
            if ldm in have or usual not in relation.diffusers:
                found.setdefault(ldm, Origin((Rows(name),), axes=4 if relation.squeezed else None))
            elif all(place in named for place in relation.diffusers):
                found.setdefault(ldm, relation.origin_in_ldm().of(named))
            else:
                found[name] = Origin((Rows(name),))
        return found

    def usual_name(self, name: str) -> str:
        """The name, in LDM's or a folder's naming, of a tensor that stands under another prefix; `name`
        itself where that is known, or nothing is.

        It may be one of the `other_prefixes`, or a folder's with the name that LDM gives it there.
        """
        return _usual_name(self, name)

    def _in_diffusers(self, names: Iterable[str]) -> dict[str, Origin]:
        found: dict[str, Origin] = {}
        for name in sorted(names, key=lambda name: "/" in name):
            if "/" in name:
                found.setdefault(name, Origin((Rows(name),)))
            else:
                found.update(self.relation_of(name).origins_in_diffusers(name))
        return found


@lru_cache(_REMEMBERED)
def _unlisted_block(family: Family, name: str) -> str:
    for naming, beginnings in family.unlisted.items():
        short = name.removeprefix(family.unet_prefix(naming))
        for beginning in beginnings.get(short.partition(".")[0], ()):
            block = beginning.block_of(short)
            if block is None:
                continue
            if block not in family.blocks:
                raise RecipeError(
                    f"tensor {shown(name)} would be in {block}, which {family.name} does not have"
                )
            return block
    return OUTSIDE


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a name is one of those that patterns with ``*`` stand for."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@lru_cache(_REMEMBERED)
def _usual_name(family: Family, name: str) -> str:
    prefixes = (*family.other_prefixes.items(), *((one.diffusers, one.ldm) for one in family.renamings))
    names = [name, *(own + name.removeprefix(other) for other, own in prefixes if name.startswith(other))]
    # What may be there beside the layout is told by patterns, which fit under other prefixes as well.
    exact = family.listed, family.beside_layout, family._original_names
    usual = next((one for one in names if any(one in held for held in exact)), None)
    return usual or next((one for one in names if family.knows(one)), name)


@lru_cache(_REMEMBERED)
def _is_known(family: Family, name: str) -> bool:
    if name in family.listed or name in family.beside_layout:
        return True
    return matches((*family.optional, *family.harmless), name) or any(
        one.has(name) for one in family.derivatives
    )


@lru_cache(_REMEMBERED)
def _relation(family: Family, name: str) -> Relation:
    for renaming in family.renamings:
        if name.startswith(renaming.ldm):
            return renaming.relation(name.removeprefix(renaming.ldm))
    return NO_PLACE


def _lines(folder: Traversable, name: str) -> list[str]:
    """The lines of a table, without the one that names its columns."""
    return folder.joinpath(name).read_text(encoding="utf-8").splitlines()[1:]


def _frozen(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same with lists as tuples."""
    return {key: _tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _tuple(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(value) if isinstance(value, list) else value for value in values)


def _beginnings(data: Mapping[str, Sequence[Any]]) -> dict[str, tuple[_Beginning, ...]]:
    """{first word of a name: beginnings with it}."""
    found: dict[str, list[_Beginning]] = {}
    for text, (word, *numbers) in data.items():
        pattern = re.compile(re.escape(text).replace(r"\#", r"(\d+)"))
        found.setdefault(text.partition(".")[0], []).append(_Beginning(pattern, word, tuple(numbers)))
    return {root: tuple(beginnings) for root, beginnings in found.items()}
