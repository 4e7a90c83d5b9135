"""`MergeRequest`: what a user asks of a merge, as plain data, before any model is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Integral
from string import ascii_lowercase
from typing import Any

from blockmerge.adapters import Lora, LoraLike
from blockmerge.anatomy import Family
from blockmerge.checkpoints import COMPONENT_WORDS, Checkpoint, CheckpointLike, Opening, name_of
from blockmerge.dtypes import DTYPES, short_dtype
from blockmerge.errors import RecipeError, WeightsError, counted, did_you_mean, listing, shown
from blockmerge.methods import IDENTITY, Method, find_method
from blockmerge.weights import Adjust, AdjustLike, BlockWeights, ElementRules, RulesLike, WeightsRequest
from blockmerge.weights.block_lists import family_named

OUTPUT_DTYPES = {dtype.short: name for name, dtype in DTYPES.items() if dtype.short}
"""The output dtypes that can be asked for, with their names in safetensors headers; ``"keep"`` keeps A's."""

NAMINGS = ("ldm", "diffusers")

ABOUT = ("title", "author", "license", "description")
"""What may be said of a model that is published, in its metadata."""

ROUNDINGS = ("end", "each")
"""When the values of a recipe are rounded: with the result, or with each of its stages as well."""

_VAE_WORDS = ("auto", "blend")

_NO_BETA, _NO_RULES, _NO_CHANGE = WeightsRequest(beta=True), ElementRules(), Adjust()


@dataclass(frozen=True)
class Found:
    """What an earlier run found for the weights: of every block, whatever has become of a preset since.

    `preset` is what that run called the presets, None where it was asked for none; `of` is what the weights
    were found for, as it is written down.
    """

    preset: str | None
    weights: Mapping[str, float | None]
    beta: Mapping[str, float | None] | None = None
    of: Mapping[str, Any] = field(default_factory=dict)

    def check_blocks(self, family: Family) -> None:
        """Raise WeightsError when the weights are not those of all blocks of a family."""
        blocks = family.blocks
        for weights in (self.weights, self.beta):
            if weights is not None and weights.keys() != set(blocks):
                raise WeightsError(
                    f"these weights were found for {counted(len(weights), 'block')} "
                    f"({listing(list(weights))}), and these models have {len(blocks)}: "
                    "a recipe in a file's metadata is for models of that file's family"
                )


_SAID = {"rounding": "round", "text_encoder": "--text-encoder, of merge"}
TEXT_ENCODERS = ("auto", "a", "blend")
"""Whose text encoders the output has: A's, or all blended as BASE says; ``"auto"`` blends them, but not in
families that use them as they were published.
"""


@dataclass(frozen=True)
class Resolved:
    """A request, looked up and checked once for models of a family: all that was left open is decided.

    `preset` is the presets' label, None without; `numbers` are all that the method takes; `notes` say which
    weights have no place in the family, and which arguments have no effect.
    """

    preset: str | None
    weights: BlockWeights
    beta: BlockWeights
    numbers: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeRequest:
    """What to merge and how; `dtype` may be spelled as `short_dtype` takes it.

    Raises RecipeError when an option has an unknown value.

    Everything that decides the output's values and form is in it, but for the models. `method` may be given
    as `find_method` takes it, and is a Method then; one without weights converts. `naming` is the output's,
    ``"ldm"`` or ``"diffusers"``, or None for A's; `ema` and `variant` are those of an Opening; `prune` leaves
    out what no loader needs; `configs` is a folder whose configs and tokenizers go into a new one. `beta` and
    `numbers` are for methods that have them; `rules` override the weights of single tensors; `clip`,
    `loras` and `adjust` are done to what the method gives, in this order; `partial` allows LoRAs with modules
    that meet no tensor; `text_encoder` is one of TEXT_ENCODERS, `rounding` one of ROUNDINGS; `about` has
    texts for some of ABOUT; with `hash`, models are recorded by their SHA-256s, too; `only` is one of
    COMPONENT_WORDS, which is all that is converted. `found` are weights that
    go before those that `weights` and `beta` ask for.
    """

    weights: WeightsRequest
    method: object = "weighted_sum"
    vae: CheckpointLike = "auto"
    text_encoder: str = TEXT_ENCODERS[0]
    dtype: str = "keep"
    allow_nonfinite: bool = False
    naming: str | None = None
    ema: str = "drop"
    prune: bool = False
    configs: CheckpointLike | None = None
    beta: WeightsRequest = _NO_BETA
    numbers: Mapping[str, Any] = field(default_factory=dict)
    rules: ElementRules = _NO_RULES
    adjust: Adjust = _NO_CHANGE
    clip: bool = False
    variant: str | None = None
    found: Found | None = None
    loras: tuple[Lora, ...] = ()
    partial: bool = False
    rounding: str = ROUNDINGS[0]
    about: Mapping[str, str] = field(default_factory=dict)
    hash: bool = False
    only: str | None = None

    def __post_init__(self) -> None:
        plain = {
            "method": find_method(self.method),
            "vae": told_from_words(os.fspath(self.vae)) if isinstance(self.vae, os.PathLike) else self.vae,
            "dtype": short_dtype(self.dtype) or self.dtype,
            "configs": os.fspath(self.configs) if isinstance(self.configs, os.PathLike) else self.configs,
            "numbers": as_plain(self.numbers),
            "about": {key: text for key, text in self.about.items() if text is not None},
            "weights": _plain_request(self.weights),
            "beta": _plain_request(self.beta),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if isinstance(self.vae, str) and self.vae != "auto" and not self.changes_values:
            # Of a single model that stays as it is there is nothing to choose or to blend.
            object.__setattr__(self, "vae", told_from_words(self.vae))
        self._fit_to(self.merge_method)
        for name, option in (("vae", self.vae), ("configs", self.configs)):
            _check_source(name, option)
        if self.vae == "":
            raise RecipeError(f"vae (--vae) is empty: it takes {self.vae_choices(2)}a file or a folder")
        if self.dtype != "keep" and self.dtype not in OUTPUT_DTYPES:
            known = ["keep", *OUTPUT_DTYPES]
            raise RecipeError(
                f"unknown dtype '{shown(self.dtype)}'{did_you_mean(self.dtype, known)} ({', '.join(known)})"
            )
        _ = self.opening  # which refuses what is no way to open a model
        if self.naming not in (None, *NAMINGS):
            raise RecipeError(f"unknown naming '{shown(self.naming)}': {' or '.join(NAMINGS)}")
        self._check_words()
        self._check_only()
        if self.loras and self.ema == "keep":
            raise RecipeError(
                "EMA copies would lack the LoRAs: ema is drop or use (--ema, of merge and bake), "
                "where LoRAs are baked in"
            )
        for name in ("clip", "prune", "allow_nonfinite", "partial", "hash"):
            check_flag(name, getattr(self, name))

    def _check_words(self) -> None:
        """Refuse what is not one of the words that an option takes, and texts that are none."""
        for key, text in self.about.items():
            if not isinstance(text, str) or not text.strip():
                raise RecipeError(f"{key} (--{key}) is a text; {shown(repr(text))} given")
        for name, word, words in (
            ("rounding", self.rounding, ROUNDINGS),
            ("text_encoder", self.text_encoder, TEXT_ENCODERS),
        ):
            if word not in words:
                option = _SAID[name]
                raise RecipeError(f"unknown {name} '{shown(word)}' ({option}): {' or '.join(words)}")

    def _check_only(self) -> None:
        """Refuse a component that there is none of, and what does not go with one alone."""
        if self.only is None:
            return
        if self.only not in COMPONENT_WORDS:
            known = f"{did_you_mean(self.only, COMPONENT_WORDS)} ({', '.join(COMPONENT_WORDS)})"
            raise RecipeError(f"unknown component '{shown(self.only)}'{known}")
        if self.merge_method is not IDENTITY:
            raise RecipeError("one component alone is converted only: leave out 'only' here")
        if self.vae != "auto":
            raise RecipeError(
                "only (--only, of convert) writes one component: leave out vae, which adds another"
            )
        if self.ema == "keep":
            raise RecipeError("only (--only, of convert) writes no EMA copies: ema is drop or use")

    def _fit_to(self, method: Method) -> None:
        """Take the method's defaults where nothing is said, and refuse what it does not take."""
        for name, weight in (("weights", "alpha"), ("beta", "beta")):
            request: WeightsRequest = getattr(self, name)
            if weight not in method.weights and request.is_asked_for:
                raise RecipeError(f"{shown(method.name)} takes no '{name}'")
            default = method.weights.get(weight, 0.0)
            if default is not None and request.default in (None, 0.0):  # beta's, where no method says
                object.__setattr__(self, name, replace(request, default=default))
        if self.clip and method.models == 1:
            raise RecipeError(f"{shown(method.name)} merges 1 model: there is no B to clip to")

    @property
    def as_stage(self) -> MergeRequest:
        """The same without what only a result has: how it is written."""
        return replace(
            self,
            dtype="keep",
            naming=None,
            prune=False,
            configs=None,
            allow_nonfinite=False,
            rounding=ROUNDINGS[0],
            about={},
            hash=False,
        )

    @property
    def merge_method(self) -> Method:
        """The method itself."""
        assert isinstance(self.method, Method)
        return self.method

    @property
    def opening(self) -> Opening:
        """How the models are opened, and the VAE."""
        return Opening(self.variant, self.ema)

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.merge_method.name

    @property
    def changes_values(self) -> bool:
        """Whether it merges at all: without weights, values are only copied and cast."""
        return bool(self.merge_method.weights)

    @property
    def restores_position_ids(self) -> bool:
        """Whether position_ids become whole numbers again also where exact floats do no harm: a merge has no
        business with them.
        """
        return not self.changes_values

    @property
    def output_dtype(self) -> str | None:
        """The dtype that all weights get, in safetensors' spelling, or None where each keeps its own."""
        return OUTPUT_DTYPES.get(self.dtype)

    @property
    def is_random(self) -> bool:
        """Whether chance, and so the seed, has a part in it."""
        has_seed = any(number.name == "seed" for number in self.merge_method.numbers)
        return has_seed or (not self.found and (self.weights.is_random or self.beta.is_random))

    @property
    def preset_label(self) -> str | None:
        """What the presets are called, with their ratios, or None without.

        Raises PresetError for an unknown one.
        """
        if self.found:
            return self.found.preset
        return None if self.weights.preset is None else self.weights.label

    def vae_file(self, models: int) -> str | None:
        """The name of the file or folder that the VAE is from, or None where it is one of so many models'."""
        if is_vae_of_models(self.vae, models):
            return None
        if isinstance(self.vae, str):
            return name_of(self.vae)
        return self.vae.name if isinstance(self.vae, Checkpoint) else "state dict"

    def vae_name(self, models: int) -> str:
        """The policy of the VAE, or the name of the file or folder it is from."""
        return self.vae_file(models) or str(self.vae)

    def keeps_text_encoders(self, family: Family) -> bool:
        """Whether the text encoders are the first model's, and do not follow BASE."""
        is_kept = {"auto": family.keeps_text_encoders, "a": True, "blend": False}[self.text_encoder]
        return is_kept and self.changes_values

    def check_model_count(self, count: int) -> None:
        """Raise RecipeError when the method does not take that many models."""
        self.merge_method.check_models(count)

    def check_weights(self) -> None:
        """Raise WeightsError where a weight that the method needs is not given, or given in two ways."""
        if self.found is None:
            self.weights.check()
            if fault := missing_beta(self.merge_method, self.beta):
                raise WeightsError(fault)

    def vae_choice(self, models: int) -> CheckpointLike | int:
        """What `vae_choice` says of this request's VAE."""
        return vae_choice(self.vae, models)

    def vae_choices(self, models: int) -> str:
        """What may be given as VAE other than a file or a folder, for messages: words that end in a comma, or
        nothing.
        """
        letters = ascii_lowercase[:models]
        return ", ".join(("auto", *letters, "blend", "")) if self.changes_values else ""

    def resolve(self, family: Family | str, models: int) -> Resolved:
        """Look up presets, read weights and check numbers, for so many models of a family.

        Raises WeightsError for weights that cannot be used, PresetError for an unknown preset, RecipeError
        for a number out of range.
        """
        self.check_weights()
        family = family_named(family)
        weights, beta = self.weights, self.beta
        if self.found:
            weights = replace(weights, preset=None, weights=self.found.weights, changes=None)
            beta = replace(beta, preset=None, weights=self.found.beta, changes=None)
            self.found.check_blocks(family)
        return Resolved(
            preset=self.preset_label,
            weights=weights.resolve(family),
            beta=beta.resolve(family),
            numbers=self.merge_method.check_numbers(self.numbers, models),
            notes=(*self._lost(family), *self._idle(family)),
        )

    def _lost(self, family: Family) -> list[str]:
        """Say which weights have no place in a family and are missed."""
        if self.found:
            return []
        asked = {"alpha": self.weights, "beta": self.beta}
        return [
            note
            for name, request in asked.items()
            if name in self.merge_method.weights
            for note in request.lost(family)
        ]

    def _idle(self, family: Family) -> Iterator[str]:
        """Say which arguments have no effect on models of a family."""
        if self.found:
            return
        if self.weights.seed and not self.is_random:
            yield "seed (--seed) has no effect, since nothing is random"
        if self.weights.sdxl_map and not (self.weights.heeds_map(family) or self.beta.heeds_map(family)):
            yield "sdxl_map (--sdxl-map) has no effect, since both mappings give the same weights"
        if self.adjust and not family.adjusted:
            yield f"adjust (--adjust) has no effect: it is for U-Nets, and these are {family.title} models"
        if self.partial and not self.loras:
            yield "partial (--partial, of merge and bake) has no effect, since there is no LoRA"


def vae_choice(vae: CheckpointLike, models: int) -> CheckpointLike | int:
    """Return what a choice of VAE means where there are so many models.

    >>> vae_choice("b", 2), vae_choice("c", 2), vae_choice("ab", 2), vae_choice("auto", 2)
    (1, 'c', 'ab', 'auto')

    A number is that of the model (0 = A) whose VAE is taken whole; only the first 26 have letters.
    ``"auto"`` and ``"blend"`` are themselves; everything else is a VAE: a path, an opened checkpoint or a
    state dict.
    """
    if not isinstance(vae, str):
        return vae
    letters = ascii_lowercase[:models]
    return letters.index(vae) if len(vae) == 1 and vae in letters else vae


def is_vae_of_models(vae: CheckpointLike, models: int) -> bool:
    """Whether a choice of VAE stands for one of so many models', and not for a VAE of its own."""
    return isinstance(vae, str) and (vae in _VAE_WORDS or isinstance(vae_choice(vae, models), int))


def missing_beta(method: Method, beta: WeightsRequest) -> str | None:
    """Say so where a method needs its second weight, and nothing is said about it: with 0 for all blocks, a
    model would count for nothing.
    """
    if "beta" not in method.weights or method.weights["beta"] is not None or beta.is_asked_for:
        return None
    return (
        f"{shown(method.name)} needs its second weight, beta, too, or a model would count for nothing: "
        "give weights_beta (--weights-beta 0.5) or preset_beta (--preset-beta high_res)"
    )


def check_flag(name: str, value: object) -> None:
    """Raise RecipeError for an argument that is neither True nor False: any text would count as True, "no" as
    well.
    """
    if not isinstance(value, bool):
        raise RecipeError(f"{name} is True or False; {type(value).__name__} given")


def make_request(
    method: object,
    numbers: Mapping[str, Any],
    weights: WeightsRequest,
    beta: WeightsRequest,
    *,
    rules: RulesLike = "",
    adjust: AdjustLike = "",
    loras: Sequence[LoraLike] = (),
    arguments: Iterable[str] | None = None,
    **options: Any,
) -> MergeRequest:
    """Read rules, adjust and LoRAs. The seed of the weights is that of the method as well, where it has one.

    Raises RecipeError, naming the argument, for what is none, and for a number that the method does not have:
    one of the caller's own `arguments` may have been meant.
    """
    found = find_method(method)
    found.check_names(numbers, others=arguments or ())
    if "seed" not in numbers and any(number.name == "seed" for number in found.numbers):
        numbers = {**numbers, "seed": weights.seed}
    return MergeRequest(
        weights,
        method=found,
        beta=beta,
        numbers=numbers,
        rules=ElementRules.of(rules),
        adjust=Adjust.of(adjust),
        loras=loras_of(loras),
        **options,
    )


def loras_of(loras: Sequence[LoraLike]) -> tuple[Lora, ...]:
    """Read a list of LoRAs. Raises RecipeError for one that stands alone, and for what is none."""
    if isinstance(loras, (str, os.PathLike, Mapping, Lora, Checkpoint)) or not isinstance(loras, Iterable):
        raise RecipeError(f"loras are a list of LoRAs; {type(loras).__name__} given")
    return tuple(map(Lora.of, loras))


def as_plain(value: Any) -> Any:
    """Return numbers, paths, lists and mappings as Python's own, so that they can be written down and
    compared; all else as it is.

    Lists become tuples, and BlockWeights the tuple of its numbers, which is read in the same way.
    """
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, Integral):  # NumPy's, too
        return int(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, BlockWeights):
        return tuple(value.values())
    if isinstance(value, Mapping):
        return {str(key): as_plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return tuple(map(as_plain, value))
    if hasattr(value, "tolist") and getattr(value, "ndim", None) in (0, 1):
        return as_plain(value.tolist())
    with suppress(TypeError, ValueError, OverflowError):
        return float(value)
    return value


def _plain_request(request: WeightsRequest) -> WeightsRequest:
    preset = request.preset
    return replace(
        request,
        preset=as_plain(preset) if isinstance(preset, (list, tuple, os.PathLike)) else preset,
        weights=as_plain(request.weights),
        changes=as_plain(request.changes),
        seed=as_plain(request.seed),
    )


def told_from_words(path: str) -> str:
    """A VAE's path as a text that is none of the words and letters that stand for something else."""
    return os.path.join(os.curdir, path) if len(path) == 1 or path in _VAE_WORDS else path


def _check_source(name: str, source: object) -> None:
    if not isinstance(source, (str, os.PathLike, Checkpoint, Mapping, type(None))):
        raise RecipeError(
            f"{name} (--{name}) is a {type(source).__name__}, which is not a model: "
            "give a path, an opened checkpoint or a state dict"
        )
