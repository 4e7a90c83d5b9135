"""Methods of the user's own: a decorated Python function becomes a `Method`.

>>> @blockmerge.merge_method()  # doctest: +SKIP
... def soften(a, b, *, alpha, amount=0.5):
...     return a + alpha * amount * (b - a)

Loads no torch: the function itself may.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from blockmerge.errors import RecipeError, shown
from blockmerge.methods import planning
from blockmerge.methods.table import Method, Number

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LOCALITIES = ("element", "row", "tensor")
_WEIGHTS = ("alpha", "beta")


def merge_method(*, locality: str = "element", formula: str = "", source: str = "") -> Callable[[_Function], _Function]:
    """Make a function a merge method, to be given as `method=` or, on the command line, as ``--method module:function``.

    The function `f(a, b, …, *, alpha, …)` gets one tensor of each model, in float32 or float64, and returns the result, a
    tensor of the same shape, which is then rounded once; it must depend on nothing else, and not change what it gets.
    Parameters by position are the models; with ``*others`` it takes any number of them. Parameters by keyword are the weights
    `alpha` and, if it has one, `beta` (those with a default need not be given), and numbers, with their defaults: a default
    of type int wants a whole number.

    `locality` is what it must see at once. ``"element"``: it may be given any stretch of a tensor, flat. ``"row"``: any
    entries of the first axis, in their shape. ``"tensor"``: the whole tensor.

    Raises RecipeError, naming the function and what it lacks.
    """

    def decorate(function: _Function) -> _Function:
        function.blockmerge_method = _method_of(function, locality, formula, source)  # type: ignore[attr-defined]
        return function

    return decorate


def own_method(wanted: object) -> Method | None:
    """Return the Method that is meant by a Method, a decorated function or ``"module:function"``; None for any other name.

    Raises RecipeError when the module cannot be imported or has no such method.
    """
    if isinstance(wanted, str):
        if ":" not in wanted:
            return None
        module_name, _, name = wanted.rpartition(":")
        if not (module_name and name):
            raise RecipeError(f"method {shown(wanted)}: a method of your own is written MODULE:FUNCTION")
        with _current_folder_first():
            try:
                module = importlib.import_module(module_name)
            except (Exception, SystemExit) as error:  # a user's module may raise anything, and may be a script that exits
                why = f"{type(error).__name__}: {error}"
                raise RecipeError(f"method {shown(wanted)}: cannot import {shown(module_name)} ({shown(why, 200)})") from error
        if not hasattr(module, name):
            raise RecipeError(f"method {shown(wanted)}: {shown(module_name)} has no '{shown(name)}'")
        wanted = getattr(module, name)
        if not (callable(wanted) or isinstance(wanted, Method)):
            raise RecipeError(
                f"{shown(f'{module_name}:{name}')} is no function: a method is one, decorated with @blockmerge.merge_method()"
            )
    if callable(wanted):
        found = getattr(wanted, "blockmerge_method", None)
        if found is None:
            raise RecipeError(f"{shown(_name(wanted))} is no merge method: decorate it with @blockmerge.merge_method()")
        wanted = found
    return wanted if isinstance(wanted, Method) else None


def _method_of(function: Callable[..., Any], locality: str, formula: str, source: str) -> Method:
    name = _name(function)
    if locality not in _LOCALITIES:
        raise RecipeError(f"{shown(name)}: unknown locality '{shown(locality)}' ({', '.join(_LOCALITIES)})")
    parameters = inspect.signature(function).parameters.values()
    models = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    others = any(one.kind == one.VAR_POSITIONAL for one in parameters)
    if not models and not others:
        raise RecipeError(f"{shown(name)} takes no models: a method is f(a, b, *, alpha)")
    keywords = [one for one in parameters if one.kind == one.KEYWORD_ONLY]
    weights = {one.name: None if one.default is one.empty else float(one.default) for one in keywords if one.name in _WEIGHTS}
    if "alpha" not in weights:
        raise RecipeError(f"{shown(name)} takes no weight: a method is f(a, b, *, alpha)")
    return Method(
        name=name,
        models=None if others else len(models),
        least=max(2, len(models)) if others else len(models),
        locality=locality,
        formula=formula or next(iter((inspect.getdoc(function) or "").splitlines()), ""),
        source=source or "your own",
        copies=planning.never,
        weights=weights,
        numbers=tuple(_number(name, one) for one in keywords if one.name not in _WEIGHTS),
        own=_rounding(name, function),
    )


def _number(method: str, parameter: inspect.Parameter) -> Number:
    if type(parameter.default) not in (int, float):
        raise RecipeError(f"{shown(method)}: the number {parameter.name} needs a default, a whole number or a float")
    return Number(parameter.name, parameter.default, kind="whole number" if isinstance(parameter.default, int) else "number")


def _rounding(name: str, function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Return the function as those of the table are: it gets tensors of any dtype, and writes into `out`."""

    def compute(*models: torch.Tensor, out: torch.Tensor, **numbers: Any) -> torch.Tensor:
        import torch

        from blockmerge.methods.arithmetic import round_into, wide_dtype

        wide = wide_dtype(*models, out)
        try:
            # Copies, so that a function that changes what it gets does no harm.
            result = function(*(model.to(wide, copy=True) for model in models), **numbers)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            why = f"{type(error).__name__}: {error}"
            raise RecipeError(f"the method {shown(name)} failed: {shown(why, 200)}") from error
        what = None
        if not isinstance(result, torch.Tensor):
            what = f"a {type(result).__name__}"
        elif not result.is_floating_point():
            what = f"numbers of {result.dtype}"
        elif result.shape != out.shape:
            what = f"shape {list(result.shape)}"
        if what is not None:
            found = f"{what} for tensors of shape {list(out.shape)}"
            raise RecipeError(f"the method {shown(name)} returned {found}: it must return a tensor of the shape it gets")
        return round_into(out, result)

    return compute


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"


@contextmanager
def _current_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
