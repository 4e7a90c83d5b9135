"""Methods of the user's own: a decorated Python function becomes a `Method`.

>>> @blockmerge.merge_method  # doctest: +SKIP
... def soften(a, b, *, alpha, amount=0.5):
...     return a + alpha * amount * (b - a)

Loads no torch: the function itself may.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar, overload

from blockmerge.errors import BlockmergeError, RecipeError, did_you_mean, shown
from blockmerge.methods import planning
from blockmerge.methods.table import Method, Number

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LOCALITIES = ("element", "row", "tensor")
_WEIGHTS = ("alpha", "beta")
_TAKEN = (
    "adjust", "allow_nonfinite", "changes", "changes_beta", "check_finite", "clip", "configs", "device",
    "dtype", "ema", "method", "module", "naming", "out", "output", "overwrite", "preset", "preset_beta",
    "progress", "rules", "sdxl_map", "threads", "vae", "variant", "weights", "weights_beta",
)  # fmt: skip
"""Arguments of merging, which a number of the same name would never get past. `seed` is not among them:
methods get it.
"""


@overload
def merge_method(
    function: _Function, /, *, locality: str = ..., formula: str = ..., source: str = ...
) -> _Function: ...
@overload
def merge_method(
    *, locality: str = ..., formula: str = ..., source: str = ...
) -> Callable[[_Function], _Function]: ...
def merge_method(
    function: Any = None, /, *, locality: str = "element", formula: str = "", source: str = ""
) -> Any:
    """Make a function a merge method, to be given as `method=` or, on the command line, as ``--method
    module:function``.

    The function `f(a, b, …, *, alpha, …)` gets one tensor of each model, in float32 or float64, and returns
    the result, a tensor of the same shape, which is then rounded once; it must depend on nothing else, and
    not change what it gets. Parameters by position are the models; with ``*others`` it takes any number of
    them. Parameters by keyword are the weights `alpha` and, if it has one, `beta` (those with a default need
    not be given), and numbers, with their defaults: a default of type int wants a whole number. No number has
    the name of an argument of `merge`, but for `seed`, which is merge's.

    `locality` is what it must see at once. ``"element"``: it may be given any stretch of a tensor, flat.
    ``"row"``: any entries of the first axis, in their shape. ``"tensor"``: the whole tensor.

    The parentheses may be left out. Raises RecipeError, naming the function and what it lacks.
    """

    def decorate(function: _Function) -> _Function:
        method = _method_of(function, locality, formula, source)
        try:
            function.blockmerge_method = method  # type: ignore[attr-defined]
        except AttributeError:
            what = "is a method of an object" if inspect.ismethod(function) else "is no plain function"
            raise RecipeError(f"{shown(method.name)} {what}: decorate a function of its own") from None
        return function

    return decorate if function is None else decorate(function)


def own_method(wanted: object) -> Method | None:
    """Return the Method that is meant by a Method, a decorated function or ``"module:function"``; None for
    any other name.

    Raises RecipeError when the module cannot be imported or has no such method.
    """
    if isinstance(wanted, str):
        if ":" not in wanted:
            return None
        module_name, _, name = wanted.rpartition(":")
        if not (module_name and name):
            raise RecipeError(f"method {shown(wanted)}: a method of your own is written MODULE:FUNCTION")
        module = _import(module_name, name)
        if not hasattr(module, name):
            meant = did_you_mean(name, [one for one, value in vars(module).items() if _is_method(value)])
            raise RecipeError(f"method {shown(wanted)}: {shown(module_name)} has no '{shown(name)}'{meant}")
        wanted = getattr(module, name)
        if not (callable(wanted) or isinstance(wanted, Method)):
            raise RecipeError(
                f"{shown(f'{module_name}:{name}')} is no function: a method is one, decorated with "
                "@blockmerge.merge_method()"
            )
    if callable(wanted):
        found = getattr(wanted, "blockmerge_method", None)
        if found is None:
            raise RecipeError(
                f"{shown(_name(wanted))} is no merge method: decorate it with @blockmerge.merge_method()"
            )
        wanted = found
    return wanted if isinstance(wanted, Method) else None


def _import(module: str, function: str) -> ModuleType:
    """Import a user's module, from the current folder or wherever Python looks. Raises RecipeError when that
    fails.
    """
    method = f"method {shown(f'{module}:{function}')}"
    if re.search(r"[/\\]|\.py$", module):
        stem = re.split(r"[/\\]", module)[-1].removesuffix(".py") or "MODULE"
        raise RecipeError(
            f"{method}: before the colon goes a module's name, not a path: {shown(f'{stem}:{function}')}"
        )
    with _current_folder_first():
        try:
            return importlib.import_module(module)
        except (
            Exception,
            SystemExit,
        ) as error:  # a user's module may raise anything, and may be a script that exits
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                why = (
                    f"no module named '{shown(error.name)}', neither in the current folder nor where "
                    "Python looks"
                )
                raise RecipeError(f"{method}: {why}") from error
            raise RecipeError(f"{method}: cannot import {shown(module)} ({_why(error)})") from error


def _is_method(value: object) -> bool:
    return isinstance(value, Method) or (inspect.isfunction(value) and hasattr(value, "blockmerge_method"))


def _why(error: BaseException) -> str:
    """What an error from the user's own code says, and of which class it is, unless it is one of
    blockmerge's.
    """
    return shown(error if isinstance(error, BlockmergeError) else f"{type(error).__name__}: {error}", 200)


def _method_of(function: Callable[..., Any], locality: str, formula: str, source: str) -> Method:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # it cannot be called, or is a builtin that does not tell
        raise RecipeError(f"{shown(function)} is no Python function: a method is f(a, b, *, alpha)") from None
    name = _name(function)
    for what, text in (("formula", formula), ("source", source)):
        if not isinstance(text, str):
            raise RecipeError(f"{shown(name)}: {what} is a text; {type(text).__name__} given")
    if locality not in _LOCALITIES:
        raise RecipeError(f"{shown(name)}: unknown locality '{shown(locality)}' ({', '.join(_LOCALITIES)})")
    models = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    others = any(one.kind == one.VAR_POSITIONAL for one in parameters)
    if not models and not others:
        raise RecipeError(f"{shown(name)} takes no models: a method is f(a, b, *, alpha)")
    if any(one.kind == one.VAR_KEYWORD for one in parameters):
        raise RecipeError(f"{shown(name)} takes any keyword (**): name each number, with its default")
    keywords = [one for one in parameters if one.kind == one.KEYWORD_ONLY]
    weights = {one.name: _usual_weight(name, one) for one in keywords if one.name in _WEIGHTS}
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


def _usual_weight(method: str, parameter: inspect.Parameter) -> float | None:
    if parameter.default is parameter.empty:
        return None
    if (default := _finite(parameter.default)) is None:
        raise RecipeError(
            f"{shown(method)}: the weight {parameter.name} needs a finite number as its default, or none"
        )
    return float(default)


def _number(method: str, parameter: inspect.Parameter) -> Number:
    if parameter.name in _TAKEN:
        raise RecipeError(
            f"{shown(method)}: a number cannot be called {parameter.name}, which is an argument of merging "
            "itself"
        )
    if (default := _finite(parameter.default)) is None:
        raise RecipeError(
            f"{shown(method)}: the number {parameter.name} needs a finite default, a whole number or a float"
        )
    if parameter.name == "seed" and (type(default), default) != (int, 0):
        raise RecipeError(
            f"{shown(method)}: the seed is the merge's own, and 0 when nobody says: give it that default"
        )
    return Number(parameter.name, default, kind="whole number" if isinstance(default, int) else "number")


def _finite(value: Any) -> int | float | None:
    """Return a number, of NumPy's too, as one of Python's; None for anything else, infinity and NaN among
    them.
    """
    with suppress(OverflowError):
        if isinstance(value, Real) and not isinstance(value, bool):
            number = int(value) if isinstance(value, Integral) else float(value)
            return number if math.isfinite(number) else None
    return None


def _rounding(name: str, function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Return the function as those of the table are: it gets tensors of any dtype, and writes into `out`."""

    def compute(*models: torch.Tensor, out: torch.Tensor, **numbers: Any) -> torch.Tensor:
        from blockmerge.methods.arithmetic import round_into, wide_dtype

        wide = wide_dtype(*models, out)
        try:
            # Copies, so that a function that changes what it gets does no harm.
            result = function(*(model.to(wide, copy=True) for model in models), **numbers)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise RecipeError(f"the method {shown(name)} failed: {_why(error)}") from error
        if wrong := _wrong(result, out):
            raise RecipeError(f"the method {shown(name)} returned {wrong}")
        return round_into(out, result)

    return compute


def _wrong(result: Any, out: torch.Tensor) -> str:
    """Say what is wrong with a function's result, and what it must be; nothing for one that can be rounded
    into `out`.
    """
    import torch

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
            f"shape {list(result.shape)} for tensors of shape {list(out.shape)}: it must return a tensor "
            "of the shape it gets"
        )
    return ""


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"


@contextmanager
def _current_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
