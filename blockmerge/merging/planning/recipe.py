"""`Recipe`: what the user wants, as plain data, before any model is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blockmerge.checkpoints import EMA_CHOICES, Checkpoint, CheckpointLike
from blockmerge.errors import RecipeError, did_you_mean, shown
from blockmerge.methods import Method, find_method
from blockmerge.version import __version__
from blockmerge.weights import Adjust, BlockWeights, ElementRules, WeightsRequest

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
"""The output dtypes that can be asked for, with their names in safetensors headers; ``"keep"`` keeps A's."""

_TORCH_DTYPES = {
    "torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32",
    "torch.float8_e4m3fn": "fp8_e4m3fn", "torch.float8_e5m2": "fp8_e5m2",
}  # fmt: skip

NAMINGS = ("ldm", "diffusers")

_NO_BETA, _NO_RULES, _NO_CHANGE = WeightsRequest(beta=True), ElementRules(), Adjust()


@dataclass(frozen=True)
class Recipe:
    """What to merge and how; `dtype` may be spelled as torch does. Raises RecipeError when an option has an
    unknown value.

    Without a `method`, one model is converted. `naming` is the output's, ``"ldm"`` or ``"diffusers"``, or
    None for A's; `ema` is one of EMA_CHOICES; `prune` leaves out what no loader needs; `configs` is a folder
    whose configs and tokenizers go into a new one. `beta` and `numbers` are for methods that have them;
    `rules` override the weights of single tensors; `clip` and `adjust` are done to what the method gives, in
    this order.
    """

    weights: WeightsRequest
    method: object = "weighted_sum"
    vae: CheckpointLike = "auto"
    dtype: str = "keep"
    allow_nonfinite: bool = False
    naming: str | None = None
    ema: str = "drop"
    prune: bool = False
    configs: str | os.PathLike[str] | None = None
    beta: WeightsRequest = _NO_BETA
    numbers: Mapping[str, Any] = field(default_factory=dict)
    rules: ElementRules = _NO_RULES
    adjust: Adjust = _NO_CHANGE
    clip: bool = False
    _method: Method | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        method = None if self.method is None else find_method(self.method)
        object.__setattr__(self, "_method", method)
        if method is not None:
            self._fit_to(method)
        object.__setattr__(self, "dtype", _TORCH_DTYPES.get(self.dtype, self.dtype))
        if self.dtype != "keep" and self.dtype not in DTYPES:
            known = ["keep", *DTYPES]
            raise RecipeError(
                f"unknown dtype '{shown(self.dtype)}'{did_you_mean(self.dtype, known)} ({', '.join(known)})"
            )
        if self.ema not in EMA_CHOICES:
            raise RecipeError(f"unknown choice '{shown(self.ema)}' for EMA copies: {', '.join(EMA_CHOICES)}")
        if self.naming not in (None, *NAMINGS):
            raise RecipeError(f"unknown naming '{shown(self.naming)}': {' or '.join(NAMINGS)}")
        for name in ("clip", "prune", "allow_nonfinite"):
            check_flag(name, getattr(self, name))

    def _fit_to(self, method: Method) -> None:
        """Take the method's defaults where nothing is said, and refuse what it does not take."""
        if "beta" not in method.weights and self.beta.is_asked_for:
            raise RecipeError(f"{shown(method.name)} takes no 'beta'")
        defaults = {"weights": method.weights["alpha"], "beta": method.weights.get("beta", 0.0)}
        for name, default in defaults.items():
            request: WeightsRequest = getattr(self, name)
            if request.default is None and default is not None:
                object.__setattr__(self, name, replace(request, default=default))
        if self.clip and method.models == 1:
            raise RecipeError(f"{shown(method.name)} merges 1 model: there is no B to clip to")

    @property
    def method_name(self) -> str:
        """The method's name, or ``"convert"``."""
        return "convert" if self._method is None else self._method.name

    @property
    def merge_method(self) -> Method:
        """The method of that name, where models are merged at all."""
        if self._method is None:
            from blockmerge.methods import IDENTITY

            return IDENTITY
        return self._method

    @property
    def changes_values(self) -> bool:
        """Transitional."""
        return self._method is not None

    @property
    def restores_position_ids(self) -> bool:
        """Transitional."""
        return self._method is None

    def vae_choice(self, models: int) -> Any:
        """Transitional."""
        letters = "abcdefghijklmnopqrstuvwxyz"[:models]
        if isinstance(self.vae, str) and len(self.vae) == 1 and self.vae in letters:
            return letters.index(self.vae)
        return self.vae

    def vae_choices(self, models: int) -> str:
        """Transitional."""
        letters = "abcdefghijklmnopqrstuvwxyz"[:models]
        return "" if self._method is None else ", ".join(("auto", *letters, "blend", ""))

    @property
    def output_dtype(self) -> str | None:
        """The dtype that all weights get, in safetensors' spelling, or None where each keeps its own."""
        return DTYPES.get(self.dtype)

    def check_model_count(self, count: int) -> None:
        """Raise RecipeError when the method does not take that many models."""
        if self._method is not None:
            self._method.check_models(count)
        elif count != 1:
            raise RecipeError(f"converting takes 1 model; {count} given")

    def resolve_numbers(self, models: int) -> dict[str, Any]:
        """Return all numbers that the method takes for so many models. Raises RecipeError for one out of
        range.
        """
        return {} if self._method is None else self._method.check_numbers(self.numbers, models)

    @property
    def is_random(self) -> bool:
        """Whether chance, and so the seed, has a part in it."""
        has_seed = self._method is not None and any(number.name == "seed" for number in self._method.numbers)
        return has_seed or self.weights.is_random or self.beta.is_random

    def idle(self, family: str) -> Iterator[str]:
        """Say which arguments are without effect on models of a family. Raises WeightsError for weights that
        cannot be used.
        """
        if self.weights.seed and not self.is_random:
            yield "seed (--seed) without effect, since nothing is left to chance"
        if self.weights.sdxl_map and not (self.weights.heeds_map(family) or self.beta.heeds_map(family)):
            yield "sdxl_map (--sdxl-map) without effect, since these weights are the same with any"

    def described(self, models: Sequence[str], weights: BlockWeights, beta: BlockWeights) -> dict[str, Any]:
        """What decides the values, as plain data for results and the output's metadata; `models` are their
        names.

        Not in it: the output's naming, variant and configs, and the folders that models and VAE are in.
        """
        return {
            "version": __version__,
            "method": self.method_name,
            "models": [model.encode("utf-8", "replace").decode() for model in models],
            "preset": self.weights.label if self.weights.preset else None,
            "weights": dict(weights) if self._method is not None else None,
            "weights_beta": dict(beta)
            if self._method is not None and "beta" in self._method.weights
            else None,
            "numbers": self.resolve_numbers(len(models)),
            "rules": str(self.rules),
            "adjust": str(self.adjust) if self.adjust else "",
            "clip": self.clip,
            "vae": self.vae_name,
            "dtype": self.dtype,
            "ema": self.ema,
            "prune": self.prune,
            "allow_nonfinite": self.allow_nonfinite,
        }

    @property
    def vae_name(self) -> str:
        """The policy of the VAE, or the name of the file or folder it is from."""
        if isinstance(self.vae, (str, os.PathLike)):
            return os.path.basename(os.fspath(self.vae))
        return self.vae.name if isinstance(self.vae, Checkpoint) else "state dict"


def check_flag(name: str, value: object) -> None:
    """Raise RecipeError for an argument that is neither True nor False: any text would count as True, "no" as
    well.
    """
    if not isinstance(value, bool):
        raise RecipeError(f"{name} is True or False; {type(value).__name__} given")


def make_recipe(
    method: object,
    numbers: Mapping[str, Any],
    weights: WeightsRequest,
    beta: WeightsRequest,
    *,
    rules: str = "",
    adjust: str = "",
    arguments: Mapping[str, object] | None = None,
    **options: Any,
) -> Recipe:
    """Read what was given as text. The seed of the weights is that of the method as well, where it has one.

    Raises RecipeError, naming the argument, for what is no text, and for a number that the method does not
    have: one of the caller's own `arguments` may have been meant.
    """
    for name, text, example in (("rules", rules, "OUT03-OUT05:attn2:0.5"), ("adjust", adjust, "0,0,0,1")):
        if not isinstance(text, str):
            raise RecipeError(f"{name} is a text, as in '{example}'; {type(text).__name__} given")
    found = find_method(method)
    found.check_names(numbers, others=arguments or ())
    if "seed" not in numbers and any(number.name == "seed" for number in found.numbers):
        numbers = {**numbers, "seed": weights.seed}
    return Recipe(
        weights,
        method=found,
        beta=beta,
        numbers=numbers,
        rules=ElementRules.parse(rules),
        adjust=Adjust.parse(adjust),
        **options,
    )
