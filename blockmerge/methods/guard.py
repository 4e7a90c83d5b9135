"""What stands between a method's function and a merge: one rounding, and checks of what a user's function
does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockmerge.errors import BlockmergeError, RecipeError, shown
from blockmerge.methods.arithmetic import round_into, wide_dtype
from blockmerge.methods.late import torch
from blockmerge.methods.planning import Rows

if TYPE_CHECKING:
    from blockmerge.methods.method import Compute, Copies, Passes


@dataclass(eq=False, repr=False)
class Guard:
    """Makes functions of one method those that merging calls.

    `own` says that they are the user's: then whatever goes wrong in them is a RecipeError. A function that
    does not `write` into `out` itself gets wide copies, and its result is rounded.
    """

    name: str
    own: bool
    writes: bool
    models: int

    def function(self, function: Callable[..., Any]) -> Compute:
        """Return what gets tensors of any dtype, and writes into `out`."""
        function = self._caught(function)
        return function if self.writes else self._rounded(function)

    def passes(self, statistics: Callable[..., Any], gather: Callable[..., Any]) -> Passes:
        """Return the same two functions."""
        statistics, gather = self._caught(statistics), self._caught(gather)

        def widened(*models: torch.Tensor) -> Any:
            wide = wide_dtype(*models, models[0])
            return statistics(*(model.to(wide, copy=True) for model in models))

        return (statistics if self.writes else widened), gather

    def copies(self, copies: Copies) -> Copies:
        """Return the same function, which names none but its models."""
        if not self.own:
            return copies
        caught = self._caught(copies)

        def checked(alpha: float, beta: float = 0.0) -> int | None:
            model: int | None = caught(alpha, beta)
            if model is not None and not self._is_model(model):
                raise RecipeError(
                    f"copies of the method {shown(self.name)} gives {shown(model)} at alpha {alpha:g} and "
                    f"beta {beta:g}: it is a model's number, from 0 for A to {self.models - 1}, or None"
                )
            return model

        return checked

    def rows(self, rows: Callable[..., Rows]) -> Callable[..., Rows]:
        """Return the same function, whose stretches are all of the axis."""
        if not self.own:
            return rows
        caught = self._caught(rows)

        def checked(shape: tuple[int, ...], alpha: float, beta: float = 0.0) -> Rows:
            parts = caught(shape, alpha, beta)
            length = shape[0] if shape else 1
            try:
                found = tuple((int(start), int(stop), model) for start, stop, model in parts)
                borders = [border for start, stop, _ in found for border in (start, stop)]
                is_whole = [0, *borders, length][::2] == [0, *borders, length][1::2]
                if is_whole and all(start <= stop and self._is_model(model) for start, stop, model in found):
                    return tuple(part for part in found if part[0] < part[1])
            except (TypeError, ValueError):
                pass
            raise RecipeError(
                f"the method {shown(self.name)} has the rows {shown(parts)} for {length}: they are "
                "(start, stop, model), in order and without gaps"
            )

        return checked

    def _is_model(self, model: object) -> bool:
        return isinstance(model, int) and not isinstance(model, bool) and 0 <= model < self.models

    def _caught(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function itself where it is not the user's."""
        if not self.own:
            return function

        @functools.wraps(function)
        def caught(*given: Any, **numbers: Any) -> Any:
            try:
                return function(*given, **numbers)
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                raise RecipeError(f"the method {shown(self.name)} failed: {why(error)}") from error

        return caught

    def _rounded(self, function: Callable[..., Any]) -> Compute:
        def compute(*models: torch.Tensor, out: torch.Tensor, **numbers: Any) -> torch.Tensor:
            wide = wide_dtype(*models, out)
            # Copies, so that a function that changes what it gets does no harm.
            result = function(*(model.to(wide, copy=True) for model in models), **numbers)
            if wrong := _wrong(result, out):
                raise RecipeError(f"the method {shown(self.name)} returned {wrong}")
            return round_into(out, result)

        return compute


def _wrong(result: Any, out: torch.Tensor) -> str:
    """Say what is wrong with a function's result, and what it must be; nothing for one that can be rounded
    into `out`.
    """
    if not isinstance(result, torch.Tensor):
        return f"a {type(result).__name__}: it must return a torch tensor"
    if result.is_meta and not out.is_meta:
        return "a meta tensor: it must return one that holds values"
    if result.layout != torch.strided:
        return "a sparse tensor: it must return a dense one"
    if not result.is_floating_point():
        return f"numbers of {result.dtype}: it must return a tensor of a float dtype, as those that it gets"
    if result.shape != out.shape:
        return (
            f"shape {list(result.shape)} for tensors of shape {list(out.shape)}: "
            "it must return a tensor of the shape it gets"
        )
    return ""


def why(error: BaseException) -> str:
    """What an error from the user's own code says, and of which class it is, unless it is one of
    blockmerge's.
    """
    return shown(error if isinstance(error, BlockmergeError) else f"{type(error).__name__}: {error}", 200)


def name_of(function: Any) -> str:
    """Return the name by which a user's function is given as a method."""
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"
