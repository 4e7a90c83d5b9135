"""`Recipe`: what the user wants, as plain data, before any model is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blockmerge.checkpoints import Checkpoint, CheckpointLike
from blockmerge.errors import RecipeError, did_you_mean, shown
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


@dataclass(frozen=True)
class Recipe:
    """What to merge and how; `dtype` may be spelled as torch does. Raises RecipeError when an option has an unknown value."""

    weights: WeightsRequest
    method: str = "weighted_sum"
    vae: CheckpointLike = "auto"
    dtype: str = "keep"
    allow_nonfinite: bool = False
    _method: Method = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_method", find_method(self.method))
        object.__setattr__(self, "dtype", _TORCH_DTYPES.get(self.dtype, self.dtype))
        if self.dtype != "keep" and self.dtype not in DTYPES:
            known = ["keep", *DTYPES]
            raise RecipeError(f"unknown dtype '{shown(self.dtype)}'{did_you_mean(str(self.dtype), known)} ({', '.join(known)})")
        if self.weights.sdxl_map not in (None, *SDXL_MAPS):
            raise RecipeError(f"unknown SDXL mapping '{shown(self.weights.sdxl_map)}': {' or '.join(SDXL_MAPS)}")

    @property
    def merge_method(self) -> Method:
        """The method of that name."""
        return self._method

    @property
    def output_dtype(self) -> str | None:
        """The dtype that all weights get, in safetensors' spelling, or None where each keeps its own."""
        return DTYPES.get(self.dtype)

    def check_model_count(self, count: int) -> None:
        """Raise RecipeError when the method does not take that many models."""
        wanted = self.merge_method.models
        if count != wanted:
            raise RecipeError(f"{self.method} merges {wanted} models; {count} given")

    def as_metadata(self, models: Sequence[Checkpoint], weights: BlockWeights, preset: str | None) -> str:
        """The recipe as the JSON text that goes into the output's metadata; file names without folders."""
        return json.dumps(
            {
                "version": __version__,
                "method": self.method,
                "models": [model.name.encode("utf-8", "replace").decode() for model in models],
                "preset": preset,
                "weights": dict(weights),
                "vae": self._vae_name(),
                "dtype": self.dtype,
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
