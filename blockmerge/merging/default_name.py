"""Where a merge goes when nobody says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from blockmerge.adapters import Lora
from blockmerge.checkpoints import name_of
from blockmerge.merging.outputs import default_ending
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.planning.written import path_of
from blockmerge.merging.recipe import Recipe

_NAME, _TOLD, _WEIGHTS, _WORD = 87, 60, 40, 24
"""The most bytes of UTF-8 that a name has without its ending, what is told of the merge, its weights, and any
other word.
"""

_REFUSED = '<>:"|?*\\/'  # in file names, by Windows


def default_output(recipe: Recipe) -> Path:
    """Return `<A>+<B>-<what is done>.safetensors`, in the current folder, for a recipe of models' paths.

    Every file system takes its characters and its length, 100 bytes at most. Words that do not fit, or hold
    other characters, end in a hash instead. Folders are not told, nor what is in a preset's file.
    """
    models = [path_of(model, "a model") for model in recipe.models]
    own = [(model, _last(name_of(model))) for model in models]
    names = "+".join(name if os.path.isdir(model) else Path(name).stem for model, name in own)
    told = _portable("-".join(_words(recipe.request, len(models))), _TOLD)
    ending = default_ending(recipe.request.naming, models[0])
    name = f"{_portable(names, _NAME - len(told.encode()))}-{told}"
    return Path(f"{name}{ending}".rstrip("."))


def output_beside(file: str | os.PathLike[str], recipe: Recipe) -> Path:
    """Return where the result of a recipe's file goes that names no output: beside it, under its name."""
    first = recipe
    while isinstance(first.models[0], Recipe):
        first = first.models[0]
    return Path(file).with_suffix(default_ending(recipe.request.naming, path_of(first.models[0], "a model")))


def _words(request: MergeRequest, models: int) -> Iterator[str]:
    """The method unless it is the usual one, the weights, and all else that was asked for."""
    if request.method_name != "weighted_sum":
        yield request.method_name
    weights, beta = request.weights, request.beta
    if weights.is_asked_for:
        yield _portable(_plain(weights.label), _WEIGHTS, "presets" if weights.preset else "weights")
    asked_for = [
        ("set", weights.changes),
        ("beta", beta.label if beta.is_asked_for else None),
        ("set-beta", beta.changes),
        *{"seed": weights.seed if request.is_random else None, **request.numbers}.items(),
        ("map", weights.sdxl_map),
        ("rules", str(request.rules)),
        ("adjust", str(request.adjust) if request.adjust else None),
        (
            "vae",
            None
            if request.vae == MergeRequest.vae
            else _last(request.vae_name(models)).removesuffix(".safetensors"),
        ),
        ("ema", None if request.ema == MergeRequest.ema else request.ema),
        ("lora", "+".join(map(_lora, request.loras))),
    ]
    yield from (_portable(_plain(f"{name}_{said}"), _WORD, name) for name, said in asked_for if said)
    if request.dtype != MergeRequest.dtype:
        yield request.dtype
    if request.clip:
        yield "clip"


def _lora(lora: Lora) -> str:
    blocks = "" if lora.blocks is None else f"_{lora.blocks}"
    return f"{lora.label}_{lora.strength:g}{blocks}"


def _last(name: str) -> str:
    """A name without the owner of a repository, or the repository's before a file's."""
    return name.rpartition("/")[2]


def _plain(text: str) -> str:
    return re.sub("[=,:]", "_", text)


def _portable(text: str, most_bytes: int, instead: str = "") -> str:
    """Return a text as it is, or its beginning (or what is said `instead`) and six digits of its hash."""
    allowed = "".join(char if char.isprintable() and char not in _REFUSED else "_" for char in text)
    if allowed == text and len(text.encode()) <= most_bytes:
        return text
    digits = blake2b(text.encode(errors="surrogatepass"), digest_size=3).hexdigest()
    return f"{(instead or allowed).encode()[: most_bytes - 7].decode(errors='ignore')}_{digits}"
