"""The tree of a recipe: every file that it is made from opened once, every stage decided once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    Makes,
    Model,
    lone_model,
    only_component,
    state_dict_name,
    told_apart,
)
from blockmerge.errors import RecipeError, counted, shown
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.planning.stages import Stage, held_for
from blockmerge.merging.recipe_tables import RESULT, free_name
from blockmerge.methods import IDENTITY

_DEEPEST = 40
"""Stages within stages. Each costs the interpreter several calls for every tensor."""
_MOST_MERGES = 1000
"""Merges for one tensor of the result. What is used twice counts twice, since it is computed twice."""


class Node(Makes):
    """A recipe, as far as its tree is concerned: `name` is what messages call it as a stage."""

    models: Sequence[CheckpointLike | Node]
    request: MergeRequest
    name: str | None
    output: str | None

    @classmethod
    def of(
        cls, models: Sequence[CheckpointLike | Node], request: MergeRequest, name: str | None = None
    ) -> Self:
        """Return the recipe of a request that is made already; as a stage, it has a name."""
        raise NotImplementedError

    def named(self, name: str | None, output: str | None = None) -> Self:
        """The same with the name that a stage has, and where its file says that the result goes."""
        raise NotImplementedError


def open_models(recipe: Node) -> list[Model]:
    """Return the models of a recipe, those that it merges itself among them.

    Raises CheckpointError and UnknownFamilyError for files that are no models, RecipeError for a tree that is
    too large, or has options in a stage that only the result can have, and what a stage is refused for, with
    its name.
    """
    tree = _Tree(recipe)
    return [tree.model(one, recipe.request) for one in recipe.models]


def inner_first(recipe: Node) -> Iterator[Node]:
    """Yield the recipes within a recipe, each once and before what it is in, and last the recipe itself."""
    seen: set[int] = set()

    def walk(one: Node) -> Iterator[Node]:
        if id(one) in seen:
            return
        seen.add(id(one))
        for model in one.models:
            if isinstance(model, Node):
                yield from walk(model)
        yield one

    return walk(recipe)


@dataclass(frozen=True)
class Leaves:
    """The files of a recipe, each once, and its stages, by what `places` says of every node: for each of its
    models the number of a file, or a node. `names` are the nodes'; the result comes first.
    """

    models: Sequence[Model]
    places: Mapping[Node, Sequence[int | Node]]
    names: Mapping[Node, str]

    def below(self, place: int | Node) -> Model:
        """The file that is the first of all that something is made of."""
        while isinstance(place, Node):
            place = self.places[place][0]
        return self.models[place]


def open_leaves(recipe: Node) -> Leaves:
    """Open the files of a recipe, and look at its stages no further. Raises what `open_models` raises."""
    tree = _Tree(recipe)
    models: list[Model] = []
    places: dict[Node, list[int | Node]] = {}
    names: dict[Node, str] = {}
    for node in tree.nodes(recipe):
        node.request.check_model_count(len(node.models))
        if node is not recipe:
            _check_options(node.name or "", node.request)
        found: list[int | Node] = []
        for one in node.models:
            if isinstance(one, Node):
                found.append(one)
                continue
            model = tree.model(one, node.request)
            if model not in models:
                models.append(model)
            found.append(models.index(model))
        places[node] = found
        names[node] = node.name or (RESULT if node is recipe else f"stage{len(names)}")
        node.request.opening.check([models[one] for one in found if isinstance(one, int)] or models)
    return Leaves(models, places, names)


def check_size(recipe: Node) -> None:
    """Raise RecipeError for a tree that is too deep, or too large."""
    _Counting().check(recipe)


class _Tree:
    def __init__(self, recipe: Node) -> None:
        self._names: dict[int, str] = {}  # of stages, by identity: two may ask for the same
        check_size(recipe)
        self._opened = self._open(recipe)
        labels = told_apart(list(self._opened.values()))
        self._labels = {id(one): label for one, label in zip(self._opened.values(), labels, strict=True)}
        self._files: dict[tuple[int, str, str | None], Model] = {}
        self._stages: dict[int, Stage] = {}
        request = recipe.request
        if any(isinstance(one, Node) for one in recipe.models):
            leaves = [self._file(one, node.request) for node, one in self._leaves(recipe)]
            self._held = held_for(request.output_dtype, leaves) if request.rounding == "end" else None

    def model(self, source: CheckpointLike | Node, request: MergeRequest) -> Model:
        """A model that a recipe of that request names."""
        return self._stage(source) if isinstance(source, Node) else self._file(source, request)

    def nodes(self, recipe: Node) -> Iterator[Node]:
        """The recipe and those within it, each once, outermost first."""
        seen: dict[int, Node] = {}
        left = [recipe]
        while left:
            node = left.pop()
            if id(node) not in seen:
                seen[id(node)] = node
                left.extend(reversed([one for one in node.models if isinstance(one, Node)]))
        return iter(seen.values())

    def _leaves(self, recipe: Node) -> Iterator[tuple[Node, CheckpointLike]]:
        for node in self.nodes(recipe):
            for one in node.models:
                if not isinstance(one, Node):
                    yield node, one

    def _open(self, recipe: Node) -> dict[object, Checkpoint]:
        """Every file, by what it is named and opened by."""
        found: dict[object, Checkpoint] = {}
        for node, source in self._leaves(recipe):
            key = _key(source, node.request)
            if key not in found:
                name = state_dict_name(len(found))
                found[key] = node.request.opening.checkpoint(source, name)
        return found

    def _file(self, source: CheckpointLike, request: MergeRequest) -> Model:
        checkpoint = self._opened[_key(source, request)]
        key = id(checkpoint), request.ema, request.only
        if key not in self._files:
            self._files[key] = _model(checkpoint, request, self._labels[id(checkpoint)])
        return self._files[key]

    def _stage(self, node: Node) -> Stage:
        if id(node) not in self._stages:
            name = self._names[id(node)] = self._name(node)
            _check_options(name, node.request)
            models = [self.model(one, node.request) for one in node.models]
            self._stages[id(node)] = Stage.merged(name, models, node.request, self._held)
        return self._stages[id(node)]

    def _name(self, node: Node) -> str:
        """What a stage is called: its own name, where no other has that."""
        taken, number = set(self._names.values()), len(self._names) + 1
        return free_name(node.name or f"stage{number}", taken)


class _Counting:
    """How large a tree is, counted without walking it: what is used twice is looked at once."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, int]] = {}

    def check(self, recipe: Node) -> None:
        """Raise RecipeError for one that is too deep, or too large."""
        merges, _ = self._size(recipe, 0)
        if merges > _MOST_MERGES:
            raise RecipeError(
                f"this recipe is {counted(merges, 'merge')} for each tensor (a stage that is used twice is "
                f"computed twice), and {_MOST_MERGES} are the most: merge a stage into a file first"
            )

    def _size(self, node: Node, depth: int) -> tuple[int, int]:
        """The merges for a tensor, and how deep they go."""
        is_deep = depth > _DEEPEST
        if not is_deep and id(node) not in self._found:
            inner = [self._size(one, depth + 1) for one in node.models if isinstance(one, Node)]
            deep = 1 + max((deep for _, deep in inner), default=0)
            self._found[id(node)] = (1 + sum(merges for merges, _ in inner), deep)
        found = self._found.get(id(node), (1, 1))
        if is_deep or depth + found[1] > _DEEPEST + 1:
            raise RecipeError(
                f"this recipe has more than {_DEEPEST} stages in one another: merge the first of them into a "
                "file first"
            )
        return found


def _key(source: CheckpointLike, request: MergeRequest) -> object:
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    return (id(source) if path is None else path), request.variant


def _check_options(name: str, request: MergeRequest) -> None:
    """Raise RecipeError for what only a result can have."""
    given = {
        "dtype": request.dtype != "keep",
        "to": request.naming is not None,
        "prune": request.prune,
        "configs": request.configs is not None,
        "round": request.rounding != "end",
        "allow_nonfinite": request.allow_nonfinite,
        "hash": request.hash,
        "ema='keep'": request.ema == "keep",
        **dict.fromkeys(request.about, True),
    }
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise RecipeError(
            f"stage {shown(name)}: {', '.join(wrong)} of a stage: only the result is written, so only it can "
            "have that"
        )


def _model(checkpoint: Checkpoint, request: MergeRequest, label: str) -> Model:
    """A file as a model; where it is only converted, it may be one component, or one is taken out of it."""
    if request.merge_method is IDENTITY and (lone := lone_model(checkpoint, label)) is not None:
        model = lone
        if request.vae != "auto":
            raise RecipeError(
                f"{shown(label)} is one component alone, with no place for a VAE: "
                "leave out vae (--vae, of convert)"
            )
    else:
        model = Model.of(checkpoint, request.ema, label)
    return model if request.only is None else only_component(model, request.only)
