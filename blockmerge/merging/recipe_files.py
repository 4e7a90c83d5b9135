"""Recipes as files: TOML or JSON, with a table for each stage.

    output = "final.safetensors"
    dtype = "fp16"
    [X]
    models = ["a.safetensors", "b.safetensors"]
    preset = "high_res"
    [final]
    models = ["X", "c.safetensors"]
    weights = 0.3

What stands at the top belongs to the result; the stage that no other uses is the result. A recipe of one
merge may have no tables at all.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from blockmerge.adapters import Lora
from blockmerge.errors import BlockmergeError, RecipeError, did_you_mean, listing, reason, shown
from blockmerge.merging.planning.request import is_vae_of_models
from blockmerge.merging.planning.written import from_asked
from blockmerge.merging.recipe_changes import with_changes
from blockmerge.merging.recipe_tables import OF_FILE, TOP, is_name, models_of, split, with_result
from blockmerge.merging.tree import Node

_LARGEST = 1 << 20  # bytes; a recipe is a page of text


@dataclass(frozen=True)
class Places:
    """Where a recipe's files are: relative to `folder`, or else by their names in `searched` folders and
    their subfolders, or else relative to the current folder.
    """

    folder: str = ""
    searched: Sequence[str] = ()
    _seen: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def of(self, text: str) -> str:
        """The path that a recipe means."""
        return _or_here(self.found(self.beside(text)), text)

    def beside(self, text: str) -> str:
        """The path that it means if it is in the recipe's own folder."""
        path = os.path.expanduser(text)
        return path if os.path.isabs(path) or not self.folder else os.path.join(self.folder, path)

    def found(self, path: str) -> str:
        """A path, or where nothing is there, one of that name in the other folders."""
        if not self.searched or os.path.lexists(path):
            return path
        name = os.path.basename(path.rstrip("/\\"))
        others = (self._names_in(folder).get(name) for folder in self.searched)
        return next((one for one in others if one is not None), path)

    def has(self, text: str) -> bool:
        """Whether there is such a file in the recipe's own folder."""
        return os.path.lexists(self.beside(text))

    def preset(self, text: str) -> str:
        """The preset that a recipe means: a file's, where there is one."""
        file = re.split(r"[@#]", text)[0]
        found = self.found(self.beside(file))
        return found + text[len(file) :] if os.path.isfile(found) else text

    def within(self, folder: str) -> Places:
        """The same for a folder that is named in the recipe."""
        return replace(self, folder=os.path.join(self.folder, os.path.expanduser(folder)))

    def _names_in(self, folder: str) -> Mapping[str, str]:
        """{name: path} of all files and folders in a folder; the first of several."""
        if folder not in self._seen:
            names: dict[str, str] = {}
            for parent, folders, files in os.walk(folder):
                folders.sort()
                for name in sorted([*folders, *files]):
                    names.setdefault(name, os.path.join(parent, name))
            self._seen[folder] = names
        return self._seen[folder]


def _or_here(found: str, text: str) -> str:
    """What was found, or where nothing is there, what a text means from the current folder."""
    return text if not os.path.lexists(found) and os.path.lexists(text) else found


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a recipe's file says, TOML or JSON. Raises RecipeError, naming the file."""
    data = _read(path)
    try:
        text = data.decode("utf-8-sig")
        read = json.loads(text, object_pairs_hook=_unique) if _is_json(path, data) else tomllib.loads(text)
        json.dumps(read, ensure_ascii=False, default=str).encode()  # half a character cannot be written again
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{shown(path)} is not a recipe: {_why(error, path, data)}") from error
    if not isinstance(read, dict):
        given = type(read).__name__
        raise RecipeError(f"{shown(path)}: a recipe is a table of options; {given} given")
    return read


def _is_json(path: str | os.PathLike[str], data: bytes) -> bool:
    return os.fspath(path).lower().endswith(".json") or data.lstrip().startswith(b"{")


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RecipeError(f"cannot read the recipe {shown(path)}: it is not a file")
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise RecipeError(f"cannot read the recipe {shown(path)}: {why}") from error
    if len(data) > _LARGEST:
        raise RecipeError(
            f"{shown(path)} is too large for a recipe: that in a merged file's metadata is shown by "
            "blockmerge recipe FILE, and read by Recipe.from_dict"
        )
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON. Raises ValueError where a name is in it twice, of which one would be lost."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name is in it twice")
    return table


def _why(error: ValueError | RecursionError, path: str | os.PathLike[str], data: bytes) -> str:
    if _is_json(path, data):
        return str(error) if "twice" in str(error) else "it is not JSON"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    said = "too deep" if isinstance(error, RecursionError) else str(error)
    if b"\\" in data and ("\\" in said or "escape" in said or "hex" in said):
        return f"{said}; paths with \\ stand in single quotes: 'C:\\models\\a.safetensors'"
    if at := re.search(r"\(at line (\d+)", said):
        line = data.decode("utf-8-sig").split("\n")[int(at[1]) - 1]
        return f"{said}: {shown(line.strip())} (TOML)"
    return f"{said} (TOML)"


def is_recipe_file(path: object) -> bool:
    """Whether a path is that of a recipe that may stand for a model, by its ending."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(".toml")


R = TypeVar("R", bound=Node)


def load(
    kind: type[R],
    path: str | os.PathLike[str],
    *,
    models: Sequence[str | os.PathLike[str]] = (),
    changes: Sequence[str] = (),
    methods: Mapping[str, object] | None = None,
) -> R:
    """Return the recipe of a file, as `Recipe.load` does; `changes` are texts as ``--set`` takes them."""
    written = read_recipe(path)
    searched = [models] if isinstance(models, (str, os.PathLike)) else models
    folders = tuple(os.path.expanduser(folder) for folder in searched)
    if wrong := [folder for folder in folders if not os.path.isdir(folder)]:
        raise RecipeError(f"{shown(wrong[0])} is not a folder, where models could be")
    places = Places(os.path.dirname(os.fspath(path)), folders)
    try:
        return recipe_of(kind, with_changes(written, changes), places, methods)
    except BlockmergeError as error:
        raise type(error)(f"{shown(path)}: {error}") from error


def recipe_of(
    kind: type[R],
    written: Mapping[str, Any],
    places: Places,
    methods: Mapping[str, object] | None = None,
) -> R:
    """Return the recipe that a table says, with its stages in tables of their own.

    Raises RecipeError, naming stage and key.
    """
    top, stages = split(written)
    for key in OF_FILE:
        if not isinstance(top.get(key), (str, type(None))):
            raise RecipeError(f"{key} is a text; {type(top[key]).__name__} given")
    output = _output(top.pop("output", None), places.folder)
    places = places.within(top.pop("models_folder")) if top.get("models_folder") else places
    stages, result = with_result(top, stages)
    building = _Building(kind, stages, places, methods)
    recipe = building.stage(result)
    if unused := [name for name in stages if name not in building.made]:
        raise RecipeError(f"the result does not use these stages: {listing(unused)}: remove them")
    return recipe.named(None if result == TOP else result, output)


def _output(text: str | None, folder: str) -> str | None:
    """Where the result goes that a recipe names: somebody else's must not write anywhere but beside
    itself.
    """
    if text is None:
        return None
    parts = re.split(r"[/\\]", text)
    is_named_elsewhere = os.path.isabs(text) or ".." in parts or parts[0].startswith("~") or ":" in parts[0]
    place = os.path.join(folder, text)
    within = os.path.join(os.path.realpath(folder or os.curdir), "")
    if not parts[0] or is_named_elsewhere or not os.path.realpath(place).startswith(within):
        raise RecipeError(
            f"output {shown(text)} is outside the recipe's folder: a recipe writes beside itself, unless an "
            "output is given (-o)"
        )
    return place


class _Building(Generic[R]):
    """Makes recipes of stages, each once."""

    def __init__(
        self,
        kind: type[R],
        stages: Mapping[str, Mapping[str, Any]],
        places: Places,
        methods: Mapping[str, object] | None,
    ) -> None:
        self._kind = kind
        self._stages, self._places, self._methods = stages, places, methods
        self.made: dict[str, R] = {}
        self._under_way: list[str] = []

    def stage(self, name: str) -> R:
        """The recipe of a stage."""
        if name in self._under_way:
            circle = " → ".join([*self._under_way[self._under_way.index(name) :], name])
            raise RecipeError(f"stages are made of one another: {shown(circle, 200)}")
        if name not in self.made:
            self._under_way.append(name)
            try:
                self.made[name] = self._make(name, self._stages[name])
            except RecursionError:
                raise RecipeError("stages within stages, too deep: merge the first into a file") from None
            self._under_way.pop()
        return self.made[name]

    def _make(self, name: str, written: Mapping[str, Any]) -> R:
        try:
            if not models_of(written):
                raise RecipeError("recipe: models are a list of files, A first")
            leaves = list(map(self._leaf, models_of(written)))
            asked = {key: self._placed(key, value, len(leaves)) for key, value in written.items()}
            del asked["models"]
            request = from_asked(asked, self._methods)
        except BlockmergeError as error:
            if name == TOP or str(error).startswith("stage"):
                raise
            raise type(error)(f"stage {shown(name)}: {_plain(error)}") from error
        return self._kind.of(leaves, request, None if name == TOP else name)

    def _leaf(self, text: object) -> R | str:
        if isinstance(text, Mapping):
            return recipe_of(self._kind, text, self._places, self._methods)
        if not isinstance(text, str):
            raise RecipeError(f"recipe: a model is a file; {type(text).__name__} given")
        if text in self._stages:
            if self._places.has(text):
                raise RecipeError(f"{shown(text)} is a stage and a file, too: rename the stage")
            return self.stage(text)
        others = [name for name in self._stages if name != TOP]
        if others and is_name(text) and not self._places.has(text):
            known = f"stages are {listing(others)}"
            raise RecipeError(
                f"{shown(text)} is neither a stage nor a file{did_you_mean(text, others)} ({known})"
            )
        return self._places.of(text)

    def _placed(self, key: str, value: Any, models: int) -> Any:
        """An option with the paths in it made such as are found from here."""
        places = self._places
        if key == "loras" and isinstance(value, (list, tuple)):
            return [self._lora(one) for one in value]
        if key == "configs" and isinstance(value, str) and value:
            return places.of(value)
        if key == "vae" and isinstance(value, str) and value and not is_vae_of_models(value, models):
            return places.of(value)
        if key in ("preset", "preset_beta"):
            if isinstance(value, str):
                return places.preset(value)
            if isinstance(value, list):
                return [places.preset(one) if isinstance(one, str) else one for one in value]
        return value

    def _lora(self, written: Any) -> Any:
        if isinstance(written, str):
            lora = Lora.parse(self._places.beside(written))
            found = self._places.found(str(lora.file))
            return {"file": _or_here(found, str(Lora.parse(written).file)), **_said_of(lora)}
        if isinstance(written, Mapping) and isinstance(written.get("file"), str):
            return {**written, "file": self._places.of(written["file"])}
        return written


def _said_of(lora: Lora) -> dict[str, Any]:
    said = {"strength": lora.strength, "blocks": lora.blocks, "name": lora.name}
    return {key: value for key, value in said.items() if value is not None}


def _plain(error: BlockmergeError) -> str:
    return str(error).removeprefix("recipe: ")


def expanded(recipe: R) -> R:
    """The recipe with those that it names as files in their place; what belongs to a result, they lose.

    Raises RecipeError for a file that is made of itself, and for what is no recipe.
    """
    return _Expanding(type(recipe)).expanded(recipe, ())


class _Expanding(Generic[R]):
    def __init__(self, kind: type[R]) -> None:
        self._kind = kind
        self._made: dict[int, R] = {}
        self._loaded: dict[str, R] = {}

    def expanded(self, recipe: R, within: tuple[str, ...]) -> R:
        """A recipe, each once; `within` are the files that it stands in."""
        if id(recipe) not in self._made:
            models = [self._model(one, within) for one in recipe.models]
            is_same = all(new is old for new, old in zip(models, recipe.models, strict=True))
            made = recipe if is_same else self._kind.of(models, recipe.request, recipe.name)
            self._made[id(recipe)] = made
        return self._made[id(recipe)]

    def _model(self, one: Any, within: tuple[str, ...]) -> Any:
        if isinstance(one, self._kind):
            return self.expanded(one, within)
        if not is_recipe_file(one) or not os.path.isfile(one):
            return one
        place = os.path.realpath(one)
        if place in within:
            raise RecipeError(f"{shown(one)} is made of itself")
        if place not in self._loaded:
            found = self.expanded(load(self._kind, one), (*within, place))
            name = os.path.splitext(os.path.basename(one))[0]
            self._loaded[place] = self._kind.of(found.models, found.request.as_stage, name)
        return self._loaded[place]
