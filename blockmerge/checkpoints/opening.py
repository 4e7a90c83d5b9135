"""`Opening`: how models are opened, the same for all functions and commands that open any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockmerge.anatomy import plain_names_of_ema
from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.model import EMA_CHOICES, Model
from blockmerge.checkpoints.open import CheckpointLike, check_variant, open_source
from blockmerge.errors import IncompatibleModelsError, RecipeError, shown


@dataclass(frozen=True)
class Opening:
    """How models are opened. What is asked for has to be in one of them at least.

    >>> opening = Opening(variant="fp16")
    >>> models = [opening.model(path) for path in ("folder/", "b.safetensors")]  # doctest: +SKIP
    >>> opening.check(models)  # doctest: +SKIP

    `variant` picks the weights of diffusers folders that have several kinds (``"fp16"``), where they have
    that; `ema`, one of EMA_CHOICES, says what becomes of EMA copies. Raises RecipeError for anything else.
    """

    variant: str | None = None
    ema: str = EMA_CHOICES[0]

    def __post_init__(self) -> None:
        if self.ema not in EMA_CHOICES:
            raise RecipeError(f"unknown choice '{shown(self.ema)}' for EMA copies: {', '.join(EMA_CHOICES)}")
        if self.variant is not None and (not isinstance(self.variant, str) or not self.variant):
            raise RecipeError(
                f"variant (--variant) is a name, as in 'fp16'; {shown(repr(self.variant))} given"
            )

    def checkpoint(self, source: CheckpointLike, name: str = "state dict") -> Checkpoint:
        """Open a checkpoint; a state dict is called `name`. Raises CheckpointError."""
        return open_source(source, name, self.variant)

    def model(self, source: CheckpointLike, name: str = "state dict") -> Model:
        """Open a model whose weights will be read; a state dict is called `name`.

        Raises CheckpointError and UnknownFamilyError.
        """
        model = Model.of(self.checkpoint(source, name), self.ema)
        model.source.check_whole()
        return model

    def check(self, models: Sequence[Model], beside: Sequence[Checkpoint] = ()) -> None:
        """Raise CheckpointError when the variant is in none of the models, nor of what is opened `beside`
        them, and IncompatibleModelsError when EMA copies are to be used and no model has any.
        """
        check_variant([*(model.source for model in models), *beside], self.variant)
        files = [model for model in models if model.is_file]
        if self.ema == "use" and not any(plain_names_of_ema(model.source.tensors) for model in files):
            raise IncompatibleModelsError(
                f"no EMA copies to use in {names_of(models)}: leave out ema='use' (--ema use)"
            )


def names_of(models: Sequence[Model]) -> str:
    """Return the names of models as messages have them: ``"a, b and c"``."""
    *first, last = [shown(model.name) for model in models]
    return f"{', '.join(first)} and {last}" if first else last
