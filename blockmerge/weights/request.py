"""`WeightsRequest`: presets or weights, and changes on top, as a user asks for them before the family is
known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from numbers import Integral

from blockmerge.anatomy import Family
from blockmerge.errors import WeightsError, counted, shown
from blockmerge.weights.block_lists import family_named, without_base
from blockmerge.weights.block_weights import SDXL_MAPS, BlockWeights, check_sdxl_map
from blockmerge.weights.grammar import (
    WeightsLike,
    notes_on,
    parse_assignments,
    parse_weights,
    read_weights,
)
from blockmerge.weights.plain_numbers import finite_number
from blockmerge.weights.preset_files import Preset
from blockmerge.weights.presets import find_share
from blockmerge.weights.random_weights import is_random

_OPTIONS = {"preset": "--preset", "weights": "--weights", "changes": "--set"}
"""The arguments, and what the command line calls them: messages are for both."""


@dataclass(frozen=True)
class WeightsRequest:
    """What a user says about weights: either `preset` or `weights`, then `changes` (``BASE=0.5,OUT11=1``).

    `preset` is one text or several, each a name, a file, or one of them scaled (``high_res@0.6``); several
    are added up, and a block that one of them skips is skipped. `seed` is for random weights. `default` is
    the weight of all blocks when nothing is said; without one, something must be. With `beta`, the request is
    for the second weight: its default is 0, its random numbers are others than alpha's, and messages speak of
    `weights_beta`.

    Raises WeightsError for a seed that is no whole number, for an unknown `sdxl_map`, and for changes that
    are no text.
    """

    preset: str | Sequence[str] | None = None
    weights: WeightsLike | None = None
    changes: str | Mapping[str, float | str | None] | None = None
    sdxl_map: str | None = None
    seed: int = 0
    beta: bool = False
    default: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):  # NumPy's are Integral too
            raise WeightsError(f"a whole number is needed as seed: found {shown(self.seed)}")
        if self.sdxl_map is not None:
            check_sdxl_map(self.sdxl_map)
        if not isinstance(self.changes, (str, Mapping, type(None))):
            raise WeightsError(
                f"{self._option('changes')} are a text, as in 'BASE=0,OUT11=1'; "
                f"{type(self.changes).__name__} given"
            )
        if isinstance(self.preset, (list, tuple)):
            object.__setattr__(self, "preset", tuple(self.preset) or None)
        if self.beta and self.default is None:
            object.__setattr__(self, "default", 0.0)

    @property
    def is_asked_for(self) -> bool:
        """Whether anything was said about these weights."""
        return not (self.preset is None and self.weights is None and self.changes is None)

    def check(self) -> None:
        """Raise WeightsError when neither or both of preset and weights are given, PresetError for no known
        preset.
        """
        if self.preset is None and self.weights is None and self.default is None:
            raise WeightsError(
                "how much of B? give a preset (--preset high_res) "
                "or weights (--weights 0.5); 'blockmerge presets' lists them"
            )
        if self.preset is not None and self.weights is not None:
            whose = " for beta" if self.beta else ""
            options = f"{self._option('preset')} or {self._option('weights')}"
            raise WeightsError(
                f"both a preset and weights are given{whose}: "
                f"give {options}; {self._option('changes')} go on top"
            )
        _ = self._shares

    def resolve(self, family: Family | str) -> BlockWeights:
        """Return the weights for a family.

        Raises WeightsError when they cannot be read, and as `check` does.
        """
        self.check()
        return self._resolve(family, self.sdxl_map)

    def _resolve(self, family: Family | str, sdxl_map: str | None) -> BlockWeights:
        seed = self._seed
        if self._shares:
            with self._blamed_on("preset"):
                tables = [preset.weights_for(family, sdxl_map, seed) for preset, _ in self._shares]
            ratios = (ratio for _, ratio in self._shares)
            weights = reduce(BlockWeights.add, map(BlockWeights.scale, tables, ratios))
        else:
            asked = self.default if self.weights is None else self.weights
            assert asked is not None
            with self._blamed_on("weights"):
                weights = parse_weights(asked, family, sdxl_map, seed)
        if self.changes is not None:
            with self._blamed_on("changes"):
                weights = weights.replace(parse_assignments(self.changes, family, seed))
        return weights

    def lost(self, family: Family | str) -> list[str]:
        """Say, a sentence each, how weights are carried over to a family's blocks by depth, which are missed
        when they are carried over otherwise, and which numbers of a list count for nothing.

        Raises WeightsError as `resolve` does.
        """
        asked = self.default if self.weights is None else self.weights
        wanted, seed = family_named(family), self._seed
        told: list[tuple[str, BlockWeights, list[str]]] = []
        for preset, ratio in self._shares:
            if ratio:
                table = preset.table_for(wanted, self.sdxl_map, seed)
                notes = preset.notes_for(wanted, self.sdxl_map, seed)
                told.append((f"preset '{shown(preset.name)}'", table, notes))
        if not self._shares and asked is not None:
            table = read_weights(asked, wanted, seed)
            told.append((self._option("weights"), table, notes_on(asked, wanted, seed)))
        return [
            f"{what}: {said}"
            for what, given, notes in told
            for said in (*notes, *_lost_of(given, wanted, self.sdxl_map))
        ]

    def change(self, held: BlockWeights, family: Family | str) -> BlockWeights:
        """Return `held`, a family's, with the weights of just those blocks that are named, in `weights` or in
        `changes`.

        Raises WeightsError for a preset, and for weights that name no blocks.
        """
        if self.preset is not None or not isinstance(self.weights, (str, Mapping, type(None))):
            raise WeightsError("only weights that name blocks keep the others: OUT05=0.7, or a mapping")
        for argument, named in (("weights", self.weights), ("changes", self.changes)):
            if named is not None:
                with self._blamed_on(argument):
                    held = held.replace(parse_assignments(named, family, self._seed))
        return held

    @property
    def label(self) -> str:
        """What is asked for, for results and file names.

        The presets' names with their ratios (``"high_res@0.6+GRAD_A@0.4"``), the weight when one number is
        given for all blocks, or the text of the weights, which may be long.
        """
        if self._shares:
            return "+".join(
                preset.name if ratio == 1 else f"{preset.name}@{ratio:g}" for preset, ratio in self._shares
            )
        value = self.default if self.weights is None else self.weights
        if isinstance(value, (int, float)):
            return f"{value:g}"
        number = finite_number(text := str(value).strip())
        return text if number is None else repr(number).removesuffix(".0")

    @property
    def is_random(self) -> bool:
        """Whether any weight is left to chance, and so to the seed."""
        return is_random((self.weights, self.changes)) or any(preset.is_random for preset, _ in self._shares)

    def heeds_map(self, family: Family | str) -> bool:
        """Whether a family's weights depend on `sdxl_map`. Raises WeightsError as `resolve` does."""
        self.check()
        return len({self._resolve(family, way) for way in (None, *SDXL_MAPS)}) > 1

    @property
    def _seed(self) -> int | str:
        return f"beta {self.seed}" if self.beta else self.seed

    @cached_property
    def _shares(self) -> list[tuple[Preset, float]]:
        """The presets that are asked for, looked up once, each with its ratio."""
        if self.preset is None:
            return []
        with self._blamed_on("preset"):
            asked = self.preset if isinstance(self.preset, tuple) else (self.preset,)
            return [find_share(text) for text in asked]

    def _option(self, name: str) -> str:
        return f"{name}_beta ({_OPTIONS[name]}-beta)" if self.beta else f"{name} ({_OPTIONS[name]})"

    @contextmanager
    def _blamed_on(self, name: str) -> Iterator[None]:
        """Say of an error in a text which of them it is in: those of alpha and beta may look the same."""
        try:
            yield
        except WeightsError as error:
            raise type(error)(f"{self._option(name)}: {error}") from error


def _lost_of(given: BlockWeights, family: Family, sdxl_map: str | None) -> Iterator[str]:
    """Say which of the weights are missed in a family, or that all are carried over by depth."""
    if given.go_by_depth_to(family):
        counts = [len(blocks) - bool(without_base(blocks)) for blocks in (given.blocks, family.blocks)]
        yield (
            f"{counts[0]} weights are carried over to {family.title}'s {counted(counts[1], 'block')} by depth"
        )
    lost = given.lost_for(family, sdxl_map)
    if not lost:
        return
    told = ", ".join(
        f"{block}={'skip' if weight is None else f'{weight:.6g}'}" for block, weight in lost.items()
    )
    yield (
        f"{len(given)} weights go to {family.title}'s {len(family.blocks)} blocks, and {told} "
        f"{'has' if len(lost) == 1 else 'have'} no place there; give {len(family.blocks)} weights"
    )
