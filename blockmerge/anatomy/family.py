"""A family: an architecture, read from its folder of data (`families/<name>/`).

A folder holds `family.toml`, the description; `layout.tsv`, every tensor of a complete file with its shape,
block and component, or a table for each version; and, where the description refers to it, `renaming.tsv`,
all described in `families/README.md`. The layout is read when it is first needed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from blockmerge.anatomy.components import TITLES
from blockmerge.anatomy.described import (
    Adjusted,
    Arms,
    Attention,
    Beginning,
    Derivative,
    Shape,
    Signs,
    Unmarked,
    Version,
    beginnings,
    frozen,
    matches,
)
from blockmerge.anatomy.numbered import FoundList
from blockmerge.anatomy.origins import NO_PLACE, Origin, Relation, Rows
from blockmerge.anatomy.renaming import Renaming, names_by_rule
from blockmerge.anatomy.sizes import (
    NUMBER,
    NumberedList,
    beginnings_of,
    blocks_of,
    expanded,
    lines_for_each,
    sizes_of,
)
from blockmerge.errors import RecipeError, UnknownFamilyError, shown

NAMINGS = ("ldm", "diffusers")
OUTSIDE = "BASE"
"""The block of all that is not in the U-Net."""

# Names: the models of a merge have the same ones, and each is asked about several times.
_REMEMBERED = 1 << 13
_LAYOUT_COLUMNS, _RENAMING_COLUMNS = 4, 3


class Listed(NamedTuple):
    """What the layout says of a tensor."""

    shape: Shape
    block: str
    component: str


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
    missing or be there beside the layout's; `configs` is what `anatomy.configs` reads, and `adapters` what
    that room reads.

    Where files say how many blocks there are, `lists` are these, of which the family has `counts`: those of
    the published models, or with `sized` a file's own. `versions` are models that differ in more, and
    `version` which it is. `core` is what the diffusion model is called, ``"unet"`` or ``"transformer"``;
    `keeps_text_encoders` says that all models use them as they were published. `aliases` are {word that other
    programs write: the blocks that it stands for}, `number_lists` {how many numbers: the words that they are
    for}.
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
    attention: Attention = field(default_factory=lambda: Attention({}))
    configs: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Any] = field(default_factory=dict)
    unlisted: Mapping[str, Mapping[str, tuple[Beginning, ...]]] = field(default_factory=dict, repr=False)
    folder: Traversable | None = field(default=None, repr=False)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    number_lists: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    core: str = "unet"
    least_shared: int = 0
    lives_in: str = ""
    other_endings: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Mapping[str, Any], ...] = ()
    keeps_text_encoders: bool = False
    order: tuple[str, ...] = ()
    lists: tuple[NumberedList, ...] = ()
    counts: tuple[int, ...] = ()
    versions: tuple[Version, ...] = ()
    version: str = ""
    takes_any_name: bool = False
    thin: Mapping[str, Any] = field(default_factory=dict)
    found: tuple[FoundList, ...] = ()
    fixed: tuple[str, ...] = ()
    relatives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Traversable) -> Family:
        """Read a family from its folder, whose name is the family's."""
        data = tomllib.loads(folder.joinpath("family.toml").read_text(encoding="utf-8"))
        names, signs = data["names"], data["signs"]
        lists = tuple(
            NumberedList(one["block"], one["usual"], {naming: one[naming] for naming in NAMINGS})
            for one in data.get("lists", [])
        )
        arms = None
        if "left" in data["blocks"]:
            arms = Arms(*(tuple(data["blocks"][part]) for part in ("left", "middle", "right")))
        completeness, prediction = data.get("completeness", {}), data.get("prediction", {})
        family = cls(
            name=folder.name.removeprefix("_"),
            title=data["title"],
            blocks=(OUTSIDE, *arms.left, *arms.middle, *arms.right) if arms else (),
            variants={channels: variant for variant, channels in data["variants"].items()},
            called=data["called"],
            arms=arms,
            carried=data.get("carried", {}),
            adjusted={name: Adjusted(**frozen(one)) for name, one in data.get("adjusted", {}).items()},
            architecture=data.get("architecture"),
            signs={naming: Signs(**frozen(signs[naming])) for naming in NAMINGS if naming in signs},
            prefixes={naming: names["prefixes"].get(naming, {}) for naming in NAMINGS},
            roots={naming: tuple(names.get("roots", {}).get(naming, ())) for naming in NAMINGS},
            beside_layout=tuple(names.get("beside_layout", ())),
            other_prefixes=names.get("other_prefixes", {}),
            optional=tuple(completeness.get("optional", ())),
            fixed=tuple(completeness.get("fixed", ())),
            harmless=tuple(completeness.get("harmless", ())),
            derivatives=tuple(
                Derivative(name, **frozen(one)) for name, one in data.get("derivatives", {}).items()
            ),
            markers=prediction.get("markers", {}),
            prediction={
                variant: Unmarked(one["unmarked"], one["note"], one.get("architectures", {}))
                for variant, one in prediction.get("variants", {}).items()
            },
            attention=Attention(**data.get("attention", {"layers": {}})),
            configs=data.get("configs", {}),
            adapters=data.get("adapters", {}),
            unlisted={naming: beginnings(data.get("unlisted", {}).get(naming, {})) for naming in NAMINGS},
            folder=folder,
            thin=data.get("thin", {}),
            relatives=frozen(data.get("relatives", {})),
            takes_any_name=data.get("takes_any_name", False),
            core=data.get("core", "unet"),
            lives_in=data.get("lives_in", ""),
            least_shared=data.get("shared_channels", 0),
            other_endings=names.get("other_endings", {}),
            rules=tuple(data.get("renaming", ())),
            keeps_text_encoders=data.get("keeps_text_encoders", False),
            order=tuple(data["blocks"].get("order", ())),
            lists=lists,
            versions=(versions := tuple(Version.read(*one) for one in data.get("versions", {}).items())),
            aliases=frozen(data.get("aliases", {})),
            number_lists={int(n): tuple(words.split()) for n, words in data.get("numbers", {}).items()},
        )
        return family._of_size(tuple(one.usual for one in lists), versions[0].name if versions else "")

    def sized(self, counts: tuple[int, ...], version: str = "") -> Family:
        """The same family with so many members of each of its `lists`; one object for the same numbers.

        >>> FAMILIES["flux1"].sized((8, 38)).blocks[2:10]
        ('D00', 'D01', 'D02', 'D03', 'D04', 'D05', 'D06', 'D07')
        """
        if (counts, version) == (self.counts, self.version):
            return self
        return _sized(self, counts, version)

    def _of_size(self, counts: tuple[int, ...], version: str) -> Family:
        assert self.folder is not None
        folder = self.folder

        def table() -> list[str]:
            lines = _lines(folder, "renaming.tsv")
            return lines_for_each(lines, sizes_of(self.lists, counts), _RENAMING_COLUMNS)

        title = next((one.title for one in self.versions if one.name == version), self.title)
        paths = {f"{path}.{NUMBER}.": one for one in self.lists for path in one.paths.values()}
        return replace(
            self,
            title=title,
            blocks=self.blocks if self.arms else (OUTSIDE, *blocks_of(self.order, self.lists, counts)),
            renamings=tuple(Renaming.of(lines=table, **one) for one in self.rules),
            counts=counts,
            version=version,
            aliases={**{path: (one.block,) for path, one in paths.items() if one.has_blocks}, **self.aliases},
            unlisted={
                naming: {**beginnings(beginnings_of(self.lists, naming)), **self.unlisted.get(naming, {})}
                for naming in NAMINGS
            },
        )

    @cached_property
    def listed(self) -> Mapping[str, Listed]:
        """{name: shape, block, component} of every tensor of a complete file, LDM naming."""
        shapes: dict[str, Shape] = {"-": ()}
        found: dict[str, Listed] = {}
        if self.folder is None:
            return found
        lines = _lines(self.folder, f"layout.{self.version}.tsv" if self.versions else "layout.tsv")
        sizes = sizes_of(self.lists, self.counts)
        for name, said, block, component in expanded(lines, sizes, _LAYOUT_COLUMNS, block=2):
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

    @property
    def core_title(self) -> str:
        """What messages call the diffusion model: ``"U-Net"``, ``"transformer"``."""
        return "U-Net" if self.core == "unet" else self.core

    @cached_property
    def titles(self) -> Mapping[str, str]:
        """{component: what messages call it}."""
        return {**TITLES, "unet": self.core_title}

    def called_component(self, component: str) -> str:
        """What results call a component: the diffusion model what it is."""
        return self.core if component == "unet" else component

    @cached_property
    def by_rule(self) -> tuple[str, ...]:
        """How names begin of components that a rule describes, and no layout."""
        return tuple(one.ldm for one in self.renamings if one.ldm != self.unet_prefix("ldm"))

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
        """The LDM name of the tensor whose second axis are the input channels, which tell the variant; empty
        where none is known to.
        """
        return "" if "ldm" not in self.signs else self.unet_prefix("ldm") + self.signs["ldm"].first

    @property
    def shared_channels(self) -> int:
        """The input channels that all variants have in common: the latent image's."""
        return self.least_shared or min(self.variants, default=0)

    def block_of(self, name: str) -> str:
        """Return the block of a tensor: the layout's, or for other names that of those that begin alike.

        Raises RecipeError when the family has no such block.
        """
        listed = self.listed.get(name)
        if listed is None and self.lists:
            name = self._original_names.get(name, name)
            listed = self.listed.get(name)
        return listed.block if listed is not None else _unlisted_block(self, name)

    def is_in_layout(self, name: str) -> bool:
        """Whether the layout has a tensor, by its canonical name in either naming."""
        return name in self.listed or name in self._original_names

    def title_and_kind(self, variant: str) -> tuple[str, str]:
        """What people call a model of a variant, of one word or several, and its kind of that.

        >>> FAMILIES["sdxl"].title_and_kind("inpainting"), FAMILIES["sd3"].title_and_kind("3.5-large")
        (('Stable Diffusion XL', 'inpainting'), ('Stable Diffusion 3.5 large', ''))
        """
        if self.takes_any_name:
            return (self.title if variant == "unknown" else f"{variant}, {self.title}"), ""
        titles = {one.name: one.title for one in self.derivatives}
        words = variant.split()
        version = next((one for one in self.versions if one.name in words), None)
        kind = [titles.get(word, word) for word in words if version is None or word != version.name]
        return self.title if version is None else version.title, ", ".join(kind)

    def scheduler_of(self, marker: str) -> str | None:
        """How the class of a folder's scheduler begins that says what a marker does: None where the settings
        of any do, empty where none does.
        """
        told = next((how for one, how in self.markers.items() if fnmatchcase(marker, one)), "none")
        return {"any": None, "none": ""}.get(told, told)

    def is_like(self, other: Family) -> bool:
        """Whether models of both can be merged: of the same family, version and blocks."""
        mine, theirs = ((one.name, one.version, one.counts, one.blocks) for one in (self, other))
        return mine == theirs

    def may_lack(self, name: str) -> bool:
        """Whether a module of the family's may do without a tensor among its parameters."""
        return self.is_fixed(name) or matches(self.optional, name)

    def is_fixed(self, name: str) -> bool:
        """Whether a tensor is a table that training leaves alone."""
        return matches(self.fixed, name)

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
        if variant is None and self.lists and len(shape) == signs.first_axes:
            return f"{shape[1]}-inputs"  # made by others for purposes of their own
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
        names = [*self.listed, *self.beside_layout]
        if not self.arms:  # whose layouts are those of transformers alone
            names += [one.ldm + name for one in self.renamings for name in names_by_rule(one.rule)]
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


@lru_cache(64)
def _sized(family: Family, counts: tuple[int, ...], version: str) -> Family:
    return family._of_size(counts, version)


@lru_cache(_REMEMBERED)
def _unlisted_block(family: Family, name: str) -> str:
    for naming, told in family.unlisted.items():
        short = name.removeprefix(family.unet_prefix(naming))
        for beginning in (*told.get(short.partition(".")[0], ()), *told.get("", ())):
            block = beginning.block_of(short)
            if block is None:
                continue
            if block not in family.blocks:
                raise RecipeError(
                    f"tensor {shown(name)} would be in {block}, which {family.name} does not have"
                )
            return block
    return OUTSIDE


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
    # What a table has no line for is unknown, and other rules are for whole components.
    if not family.arms and name.startswith(family.by_rule) and _relation(family, name).places:
        return True
    if family.takes_any_name and name.startswith(tuple(family.prefixes["ldm"])):
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
