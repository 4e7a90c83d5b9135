"""A request as plain data, and read back: as it was asked, and as a run has resolved it.

As asked, keys are the command line's long options, `_` for `-`, and numbers of the method by their own names;
what is as by default is left out. As run, as an output's metadata has it, everything is there, also what was
looked up or drawn: the weights of every block. Both hold names for models, VAE and configs: paths as they
were given in the first, names without folders in the second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockmerge.adapters import Lora
from blockmerge.checkpoints import Checkpoint, CheckpointLike, in_cache, name_of
from blockmerge.errors import RecipeError, counted, listing, shown
from blockmerge.merging.planning.request import (
    ABOUT,
    ROUNDINGS,
    TEXT_ENCODERS,
    Found,
    MergeRequest,
    Resolved,
    as_plain,
    is_vae_of_models,
    make_request,
    told_from_words,
)
from blockmerge.methods import IDENTITIES, METHODS, Method, find_method
from blockmerge.version import __version__
from blockmerge.weights import WeightsRequest
from blockmerge.weights.plain_numbers import finite_number

_OF_WEIGHTS = ("preset", "weights", "set")
_ASKED = (*_OF_WEIGHTS, *(f"{key}_beta" for key in _OF_WEIGHTS))
"""What was asked of the weights, which a run replaces with what it has found."""

_TEXTS = (
    "method", "vae", "text_encoder", "dtype", "to", "ema", "variant", "configs", "sdxl_map", "round",
    "only", *ABOUT,
)  # fmt: skip
_FLAGS = ("clip", "prune", "allow_nonfinite", "partial", "hash")
OPTIONS = (*_ASKED, *_TEXTS, *_FLAGS, "rules", "adjust", "seed", "numbers", "found", "loras")
"""The keys of a request that is written as asked; all others are numbers of its method."""

_AS_RUN = frozenset((
    "version", "method", "models", "preset", "weights", "weights_beta", "numbers", "rules", "adjust",
    "clip", "vae", "vae_file", "dtype", "ema", "prune", "naming", "variant", "configs", "allow_nonfinite",
    "asked", "loras", "partial", "round", "text_encoder", "files", "stages", "result", "about", "hash",
    "only",
))  # fmt: skip

_NOT_NUMBERS = (*OPTIONS, "models", "version")

_METHOD, _DTYPE, _EMA, _VAE = "weighted_sum", "keep", "drop", "auto"


def as_asked(request: MergeRequest) -> dict[str, Any]:
    """Return what was asked for, without what is as by default: all that `from_asked` needs, ready for JSON.

    Raises RecipeError for what is in memory only and so has no name.
    """
    weights, found = request.weights, request.found
    asked: dict[str, Any] = {
        "method": None if request.method is METHODS[_METHOD] else _method_written(request.merge_method),
        **_weights_asked(weights, request.beta),
        "rules": [str(rule) for rule in request.rules.rules] or None,
        "adjust": str(request.adjust) if request.adjust else None,
        "clip": request.clip or None,
        "seed": weights.seed or None,
        "sdxl_map": weights.sdxl_map,
        "vae": None if _is(request.vae, _VAE) else _vae_written(request.vae),
        "text_encoder": None if request.text_encoder == TEXT_ENCODERS[0] else request.text_encoder,
        "ema": None if request.ema == _EMA else request.ema,
        "dtype": None if request.dtype == _DTYPE else request.dtype,
        "to": request.naming,
        "prune": request.prune or None,
        "variant": request.variant,
        "configs": None if request.configs is None else path_of(request.configs, "configs"),
        "allow_nonfinite": request.allow_nonfinite or None,
        "loras": [_lora_asked(lora) for lora in request.loras] or None,
        **request.about,
        "only": request.only,
        "partial": request.partial or None,
        "hash": request.hash or None,
        "round": None if request.rounding == ROUNDINGS[0] else request.rounding,
        "found": found
        and {"of": found.of, "preset": found.preset, "weights": found.weights, "weights_beta": found.beta},
    }
    said = {key: value for key, value in asked.items() if value is not None}
    return {key: for_json(value, key) for key, value in {**said, **_numbers_asked(request)}.items()}


def _numbers_asked(request: MergeRequest) -> dict[str, Any]:
    """The method's numbers by their names; those that have the name of something else in a table apart."""
    numbers = dict(request.numbers)
    if numbers.get("seed") == request.weights.seed:
        del numbers["seed"]  # as it is where nobody says
    apart = {name: number for name, number in numbers.items() if name in _NOT_NUMBERS}
    by_name = {name: number for name, number in numbers.items() if name not in apart}
    return {**by_name, "numbers": apart} if apart else by_name


def from_asked(
    written: Mapping[str, Any],
    methods: Mapping[str, object] | None = None,
    *,
    vae: CheckpointLike | None = None,
    configs: CheckpointLike | None = None,
    loras: Sequence[CheckpointLike] | None = None,
) -> MergeRequest:
    """Return the request that `as_asked` has written, with another VAE, configs or files of LoRAs where they
    are given.

    A method of the user's own is taken from `methods` alone: no module is imported because a file names it.
    Raises RecipeError, naming the key, for what `as_asked` does not write.
    """
    for key in _TEXTS:
        _check(written, key, str, "a text")
    for key in ("set", "set_beta"):
        _check(written, key, (str, Mapping), "a text or a table")
    for key in ("preset", "preset_beta", "rules"):
        _check(written, key, (str, list, tuple), "a text or a list of texts")
        if not isinstance(written.get(key), (str, type(None))):
            _check_each(written[key], key)
    _check(written, "adjust", (str, list, tuple), "a text or a list of numbers")
    for key in ("weights", "weights_beta"):
        _check(written, key, (str, int, float, list, tuple, Mapping), "a text, a number, a list or a table")
    _check(written, "loras", (list, tuple), "a list")
    _check(written, "numbers", Mapping, "a table")
    _check(written, "found", Mapping, "a table")
    by_name = {key: value for key, value in written.items() if key not in OPTIONS}
    rules = written.get("rules") or ""
    if vae is not None:
        written = {**written, "vae": Path(vae) if isinstance(vae, str) and vae else vae}
    same = {key: key for key in ("vae", "text_encoder", "dtype", "ema", "variant", "only")}
    beside = {**same, "to": "naming", "round": "rounding"}
    options = {name: written[key] for key, name in beside.items() if written.get(key) is not None}
    about = {key: written[key] for key in ABOUT if written.get(key) is not None}
    flags = {key: written[key] for key in _FLAGS if written.get(key) is not None}
    return make_request(
        _method(_METHOD if written.get("method") is None else written["method"], methods),
        as_plain({**by_name, **(written.get("numbers") or {})}),
        _weights(written, ""),
        _weights(written, "_beta"),
        rules=rules,
        adjust=written.get("adjust") or "",
        arguments=(*OPTIONS, "models"),
        configs=written.get("configs") if configs is None else configs,
        loras=_loras(written.get("loras") or (), loras),
        found=_found(written.get("found"), written),
        about=about,
        **options,
        **flags,
    )


def as_run(
    request: MergeRequest,
    models: Sequence[str],
    resolved: Resolved,
    lora_blocks: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Return what has decided the values, for results and the output's metadata, ready for JSON.

    `models` are names, `lora_blocks` the weights of every block of each LoRA. No folder is in it, whosever
    computer it was. `asked` holds what the weights of the blocks do not tell, presets and chance; without
    these it is empty, so that a merge is the same file in whatever form its weights were given.
    """
    has = request.merge_method.weights
    run: dict[str, Any] = {
        "version": __version__,
        "method": _method_written(request.merge_method),
        "models": list(models),
        "preset": resolved.preset,
        "weights": dict(resolved.weights) if "alpha" in has else None,
        "weights_beta": dict(resolved.beta) if "beta" in has else None,
        "numbers": resolved.numbers,
        "rules": str(request.rules),
        "adjust": str(request.adjust) if request.adjust else "",
        "clip": request.clip,
        "vae": request.vae_name(len(models)),
        "vae_file": request.vae_file(len(models)),
        "dtype": request.dtype,
        "ema": request.ema,
        "prune": request.prune,
        "naming": request.naming,
        "variant": request.variant,
        "configs": None if request.configs is None else _name_of(request.configs),
        "allow_nonfinite": request.allow_nonfinite,
        "asked": _asked_of_a_run(request, resolved.preset),
    }
    if request.hash:
        run["hash"] = True
    if request.text_encoder != TEXT_ENCODERS[0]:
        run["text_encoder"] = request.text_encoder
    if request.only:
        run["only"] = request.only
    if request.about:
        run["about"] = dict(request.about)
    if request.loras:
        run |= {"loras": list(map(_lora_run, request.loras, lora_blocks)), "partial": request.partial}
    return {key: _decodable(for_json(value, key)) for key, value in run.items()}


def has_stages(written: Mapping[str, Any]) -> bool:
    """Whether a recipe has stages in tables of their own."""
    return any(isinstance(value, Mapping) and key not in OPTIONS for key, value in written.items())


def is_as_run(written: Mapping[str, Any]) -> bool:
    """Whether a request is written as run: only such a one knows a version."""
    return "version" in written


def asked_of_run(run: Mapping[str, Any], models: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a request that was written as run as one that is written as asked, to the same weights; and what
    it calls those of ``"vae"`` and ``"configs"`` that it does not say the place of.
    """
    same = ("method", "rules", "adjust", "clip", "dtype", "ema", "prune", "variant", "hash", "text_encoder")
    as_written = (*same, "only", "numbers", "allow_nonfinite", "vae", "loras", "partial")
    asked = {key: run.get(key) for key in as_written}
    asked["to"] = run.get("naming")
    _check(run, "about", Mapping, "a table")
    asked |= {key: text for key, text in (run.get("about") or {}).items() if key in ABOUT}
    for key in ("vae", "vae_file", "configs"):
        _check(run, key, str, "a text")
    _check(run, "asked", Mapping, "a table")
    if unknown := (run.get("asked") or {}).keys() - {*_ASKED, "seed", "sdxl_map"}:
        raise RecipeError(f"recipe: unknown key {listing(sorted(map(str, unknown)))} in asked")
    if unknown := run.keys() - _AS_RUN:
        raise RecipeError(
            f"recipe: unknown key {listing(sorted(map(str, unknown)))}, "
            f"written by version {shown(run['version'])}; this is {__version__}"
        )
    if run.get("weights") is not None:
        weights = {"weights": run["weights"], "weights_beta": run.get("weights_beta")}
        asked |= run.get("asked") or weights
        asked["found"] = {"of": _looked_at(asked), "preset": run.get("preset"), **weights}
    places = {key: run[key] for key in ("configs",) if run.get(key) is not None}
    if run.get("loras"):
        _check(run, "loras", (list, tuple), "a list")
        places["loras"] = ", ".join(
            str(lora.get("name")) for lora in run["loras"] if isinstance(lora, Mapping)
        )
    file = run.get("vae_file")
    if file is None and not is_vae_of_models(run.get("vae") or _VAE, models):
        file = run["vae"]
    if file is not None:
        places["vae"] = file
        del asked["vae"]
    return asked, places


def _lora_asked(lora: Lora) -> str | dict[str, Any]:
    """A LoRA as the command line has it, or a table where its blocks are no text."""
    file = path_of(lora.file, "a LoRA")
    said = {"strength": lora.strength, "blocks": as_plain(lora.blocks), "name": lora.name}
    if isinstance(lora.blocks, (str, type(None))) and lora.name is None and ":" not in file:
        blocks = "" if lora.blocks is None else f":{lora.blocks}"
        return f"{file}:{lora.strength!r}{blocks}"
    return {"file": file, **{key: value for key, value in said.items() if value is not None}}


def _lora_run(lora: Lora, blocks: Mapping[str, float]) -> dict[str, Any]:
    weights = None if lora.blocks is None else dict(blocks)
    return {"name": lora.label, "strength": lora.strength, "blocks": weights}


def _loras(written: Sequence[object], files: Sequence[CheckpointLike] | None) -> list[Lora]:
    """The LoRAs that are written down, of other files where these are given."""
    if files is not None and len(files) != len(written):
        raise RecipeError(f"the recipe has {counted(len(written), 'LoRA')}; {len(files)} given")
    return [_lora(one, None if files is None else files[number]) for number, one in enumerate(written)]


def _lora(written: object, file: CheckpointLike | None) -> Lora:
    if isinstance(written, str) and file is None:
        return Lora.parse(written)
    if not isinstance(written, Mapping) or written.keys() - {"file", "name", "strength", "blocks"}:
        raise RecipeError("recipe: a LoRA is a text FILE:STRENGTH:BLOCKS, or a table of these and a name")
    file = written.get("file") if file is None else file
    if file is None:
        raise RecipeError(f"recipe: the LoRA {shown(written.get('name', ''))} has no file")
    return Lora(file, written.get("strength", 1.0), written.get("blocks"), written.get("name"))


def path_of(source: object, what: str) -> str:
    """The path of something that is a file or folder, as it was given. Raises RecipeError for what is not."""
    path = source.path if isinstance(source, Checkpoint) else source
    if not isinstance(path, (str, os.PathLike)):
        is_model = isinstance(source, (Checkpoint, Mapping))
        where = "in memory" if is_model else f"a {type(source).__name__}"
        raise RecipeError(f"{what} is {where}, and a recipe that is written down can only name files")
    return os.fspath(path)


def _vae_written(vae: CheckpointLike) -> str:
    return vae if isinstance(vae, str) else told_from_words(path_of(vae, "the VAE"))


def for_json(value: Any, what: str) -> Any:
    """A copy with lists for tuples. Raises RecipeError, saying what it is, for what JSON has no place for."""
    if isinstance(value, Mapping):
        return {str(key): for_json(entry, what) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(entry, what) for entry in value]
    if not isinstance(value, (str, int, float, type(None))):
        raise RecipeError(f"{what} cannot be written down: {shown(value)} is a {type(value).__name__}")
    return value


def _weights_asked(weights: WeightsRequest, beta: WeightsRequest) -> dict[str, Any]:
    asked = (weights.preset, weights.weights, weights.changes, beta.preset, beta.weights, beta.changes)
    return dict(zip(_ASKED, asked, strict=True))


def _asked_of_a_run(request: MergeRequest, label: str | None) -> dict[str, Any]:
    weights, beta = request.weights, request.beta
    has_preset = weights.preset is not None or beta.preset is not None
    if not (has_preset or weights.is_random or beta.is_random):
        return {}
    asked = _weights_asked(weights, beta)
    names = _texts(weights.preset)
    told = (label or "").split("+")  # the presets' own names, whatever they were called and wherever they lie
    asked["preset"] = (
        [_with_ratio_of(text, name) for text, name in zip(names, told, strict=True)]
        if len(told) == len(names)
        else [_without_folder(text) for text in names]
    ) or None
    asked["preset_beta"] = [_without_folder(text) for text in _texts(beta.preset)] or None
    asked |= {"seed": weights.seed or None, "sdxl_map": weights.sdxl_map}
    return {key: value for key, value in asked.items() if value is not None}


def _texts(preset: str | Sequence[str] | None) -> Sequence[str]:
    return (preset,) if isinstance(preset, str) else preset or ()


def _with_ratio_of(text: str, name: str) -> str:
    """A preset's name as a label has it, with its ratio in full."""
    bare, at, _ = name.rpartition("@")
    ratio = finite_number(text.rpartition("@")[2])
    return name if not at or ratio is None else f"{bare}@{ratio!r}"


def _weights(written: Mapping[str, Any], suffix: str) -> WeightsRequest:
    preset, weights, changes = (written.get(f"{key}{suffix}") for key in _OF_WEIGHTS)
    seed = 0 if written.get("seed") is None else written["seed"]
    return WeightsRequest(
        preset, weights, changes, written.get("sdxl_map"), seed=seed, beta=suffix == "_beta"
    )


def _looked_at(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options on which the weights of the blocks depend."""
    return {key: asked[key] for key in (*_ASKED, "seed", "sdxl_map") if asked.get(key) is not None}


def _found(written: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> Found | None:
    if written is None:
        return None
    if unknown := written.keys() - {"of", "preset", "weights", "weights_beta"}:
        raise RecipeError(f"recipe: unknown key {listing(sorted(map(str, unknown)))} in found")
    _check(written, "preset", str, "a text")
    for key in ("of", "weights", "weights_beta"):
        _check(written, key, Mapping, "a table")
    if written.get("weights") is None:
        raise RecipeError("recipe: found has no weights")
    for block, weight in {**written["weights"], **(written.get("weights_beta") or {})}.items():
        if isinstance(weight, (bool, str)):
            raise RecipeError(
                f"recipe: {shown(block)} was found to be {shown(weight)}, which is not a number"
            )
    of = as_plain(written.get("of") or {})
    if of != as_plain(_looked_at(asked)):
        raise RecipeError(
            "recipe: its found are the weights of other presets, weights or seed than it asks for now: "
            "remove found, so that what it asks for is looked up"
        )
    return Found(written.get("preset"), dict(written["weights"]), as_plain(written.get("weights_beta")), of)


def _method_written(method: Method) -> str:
    """A method's name, with a colon in all that are not blockmerge's."""
    own = (METHODS.get(method.name), IDENTITIES.get(method.name))
    is_known = any(one is method for one in own) or ":" in method.name
    return method.name if is_known else f":{method.name}"


def _method(name: str, methods: Mapping[str, object] | None) -> object:
    if not isinstance(methods, (Mapping, type(None))):
        raise RecipeError(
            f"methods are functions by their names, {{'module:function': FUNCTION}}; "
            f"{type(methods).__name__} given"
        )
    if methods and name in methods:
        found = find_method(methods[name])
        if _method_written(found) != name:
            raise RecipeError(f"the recipe's method is {shown(name)}; {shown(found.name)} given for it")
        return found
    if ":" in name:
        raise RecipeError(
            f"the recipe's method {shown(name)} is a function of somebody's own, and no code is run "
            f"because a recipe names it: give the function, methods={{'{shown(name)}': FUNCTION}}"
        )
    return name


def _check(written: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], what: str) -> None:
    value = written.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        raise RecipeError(f"recipe: {key} is {what}; {type(value).__name__} given")


def _check_each(values: Sequence[object], key: str) -> None:
    for value in values:
        if not isinstance(value, str):
            raise RecipeError(f"recipe: {key} are texts; {type(value).__name__} given")


def _is(value: object, word: str) -> bool:
    return isinstance(value, str) and value == word


def _name_of(source: CheckpointLike) -> str:
    if isinstance(source, (str, os.PathLike)):
        return name_of(source) if in_cache(source) else _without_folder(os.path.normpath(source))
    return source.name if isinstance(source, Checkpoint) else "state dict"


def _without_folder(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _decodable(value: Any) -> Any:
    """The same with all texts as UTF-8 has them: names of files may be bytes that are none."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return list(map(_decodable, value))
    return {key: _decodable(entry) for key, entry in value.items()} if isinstance(value, dict) else value
