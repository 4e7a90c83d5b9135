"""`Recipe`: what the user wants, as plain data, before any model is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blockmerge.checkpoints import EMA_CHOICES, Checkpoint, CheckpointLike
from blockmerge.errors import RecipeError, counted, did_you_mean, shown
from blockmerge.methods import Method, find_method
from blockmerge.version import __version__
from blockmerge.weights import BlockWeights, WeightsRequest

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
"""The output dtypes that can be asked for, with their names in safetensors headers; ``"keep"`` keeps A's."""

_TORCH_DTYPES = {
    "torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32",
    "torch.float8_e4m3fn": "fp8_e4m3fn", "torch.float8_e5m2": "fp8_e5m2",
}  # fmt: skip

SDXL_MAPS = ("name", "resolution")
NAMINGS = ("ldm", "diffusers")


@dataclass(frozen=True)
class Recipe:
    """What to merge and how; `dtype` may be spelled as torch does. Raises RecipeError when an option has an unknown value.

    Without a `method`, one model is converted. `naming` is the output's, ``"ldm"`` or ``"diffusers"``, or None for A's;
    `ema` is one of EMA_CHOICES; `prune` leaves out what no loader needs;
    `configs` is a folder whose configs and tokenizers go into a new one.
    """

    weights: WeightsRequest
    method: str | None = "weighted_sum"
    vae: CheckpointLike = "auto"
    dtype: str = "keep"
    allow_nonfinite: bool = False
    naming: str | None = None
    ema: str = "drop"
    prune: bool = False
    configs: str | os.PathLike[str] | None = None
    _method: Method | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_method", None if self.method is None else find_method(self.method))
        object.__setattr__(self, "dtype", _TORCH_DTYPES.get(self.dtype, self.dtype))
        if self.dtype != "keep" and self.dtype not in DTYPES:
            known = ["keep", *DTYPES]
            raise RecipeError(f"unknown dtype '{shown(self.dtype)}'{did_you_mean(str(self.dtype), known)} ({', '.join(known)})")
        if self.weights.sdxl_map not in (None, *SDXL_MAPS):
            raise RecipeError(f"unknown SDXL mapping '{shown(self.weights.sdxl_map)}': {' or '.join(SDXL_MAPS)}")
        if self.ema not in EMA_CHOICES:
            raise RecipeError(f"unknown choice '{shown(self.ema)}' for EMA copies: {', '.join(EMA_CHOICES)}")
        if self.naming not in (None, *NAMINGS):
            raise RecipeError(f"unknown naming '{shown(self.naming)}': {' or '.join(NAMINGS)}")

    @property
    def merge_method(self) -> Method:
        """The method of that name, where models are merged at all."""
        assert self._method is not None
        return self._method

    @property
    def output_dtype(self) -> str | None:
        """The dtype that all weights get, in safetensors' spelling, or None where each keeps its own."""
        return DTYPES.get(self.dtype)

    def check_model_count(self, count: int) -> None:
        """Raise RecipeError when the method does not take that many models."""
        wanted = 1 if self._method is None else self._method.models
        if count != wanted:
            what = f"{self.method} merges" if self.method else "converting takes"
            raise RecipeError(f"{what} {counted(wanted, 'model')}; {count} given")

    def as_metadata(self, models: Sequence[Checkpoint], weights: BlockWeights) -> str:
        """The recipe as the JSON text that goes into the output's metadata; file names without folders."""
        return json.dumps(
            {
                "version": __version__,
                "method": self.method,
                "models": [model.name.encode("utf-8", "replace").decode() for model in models],
                "preset": self.weights.label if self.weights.preset else None,
                "weights": dict(weights) if self.method is not None else None,
                "vae": self._vae_name(),
                "dtype": self.dtype,
                "ema": self.ema,
                "prune": self.prune,
                "allow_nonfinite": self.allow_nonfinite,
            },
            ensure_ascii=False,
        )

    def _vae_name(self) -> str:
        if isinstance(self.vae, (str, os.PathLike)):
            return os.path.basename(os.fspath(self.vae))
        return self.vae.name if isinstance(self.vae, Checkpoint) else "state dict"


def check_numbers(method: str, preset_beta: object, weights_beta: object, numbers: Mapping[str, object]) -> None:
    """Raise RecipeError for a second weight or an extra number that the method does not have."""
    given = [*(["beta"] if preset_beta is not None or weights_beta is not None else []), *numbers]
    if given:
        raise RecipeError(f"{find_method(method).name} takes no '{shown(given[0])}'")
