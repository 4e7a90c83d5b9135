"""Methods of the user's own, found by ``"module:function"``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from blockmerge.errors import RecipeError, did_you_mean, shown
from blockmerge.methods.guard import name_of, why
from blockmerge.methods.method import Method


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
                f"{shown(f'{module_name}:{name}')} is not a function: "
                "a method is one, decorated with @blockmerge.merge_method()"
            )
    if callable(wanted):
        found = getattr(wanted, "blockmerge_method", None)
        if found is None:
            raise RecipeError(
                f"{shown(name_of(wanted))} is not a merge method: decorate it with @blockmerge.merge_method()"
            )
        wanted = found
    return wanted if isinstance(wanted, Method) else None


def _import(module: str, function: str) -> ModuleType:
    """Import a user's module, from the current folder or wherever Python looks.

    Raises RecipeError when that fails.
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
                missing = (
                    f"no module named '{shown(error.name)}', "
                    "neither in the current folder nor where Python looks"
                )
                raise RecipeError(f"{method}: {missing}") from error
            raise RecipeError(f"{method}: cannot import {shown(module)} ({why(error)})") from error


def _is_method(value: object) -> bool:
    return isinstance(value, Method) or (inspect.isfunction(value) and hasattr(value, "blockmerge_method"))


@contextmanager
def _current_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
