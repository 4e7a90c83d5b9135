"""What lies beside the weights of a diffusers folder: configs, scheduler, tokenizers, and the index of all.

And what of it a single file cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from blockmerge.anatomy import TITLES, Anatomy, Family, is_position_ids, is_prediction_marker
from blockmerge.anatomy.configs import folder_configs, is_of_flow, names_of_core, prediction_settings
from blockmerge.anatomy.structure import names_in_config
from blockmerge.checkpoints import (
    LARGEST_CARRIED,
    SCHEDULER,
    CheckpointLike,
    DiffusersFolder,
    Model,
    prediction_of_scheduler,
    told_prediction,
)
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import CheckpointError, IncompatibleModelsError, UnknownFamilyError, listing, shown
from blockmerge.merging.outputs.configs_folder import (
    ConfigsFolder,
    is_pipeline,
    needed_tokenizers,
    read_small,
    tokenizer_class,
)
from blockmerge.merging.outputs.output import NamedTensor

_QUANTISATION = "quantization_config"  # by which diffusers and transformers unpack weights
_SETTINGS = ("epsilon", "v_prediction", "sample")
"""What any scheduler can be set to."""
_TEXT = ("hidden_size", "num_hidden_layers", "d_model", "num_layers")
_STRUCTURE = {
    "unet": ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type"),
    "transformer": (
        "in_channels", "guidance_embeds", "_class_name", "num_layers", "num_single_layers", "n_layers",
        "attention_head_dim", "num_attention_heads", "dim", "hidden_size", "joint_attention_dim",
        "text_embed_dim", "pos_embed_max_size", "dual_attention_layers", "qk_norm",
    ),
    "text_conditioner": ("num_layers", "model_dim", "target_vocab_size"),
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "text_encoder_3": _TEXT,
}  # fmt: skip
"""By which keys a config is known to be that of other tensors."""
_OF_A_VARIANT = {"in_channels", "guidance_embeds"}
"""Those that differ between models of one kind."""


def folder_files(
    models: Sequence[Model], tensors: Sequence[NamedTensor], anatomy: Anatomy, configs: CheckpointLike | None
) -> tuple[dict[str, bytes], list[str]]:
    """Return {path: bytes} of all that lies beside the weights, and notes for the user.

    Configs, tokenizers and scheduler come from the folder `configs`, else from the first model that is a
    folder; what none of them has, or has for other tensors, is worked out from shapes. What A's markers and
    metadata say of its prediction goes before another folder's scheduler. Raises CheckpointError when files
    cannot be read, IncompatibleModelsError when a component is too incomplete to have a config, or `configs`
    is of another kind of model.
    """
    if anatomy.family.takes_any_name and is_pipeline(models[0].source):
        return _as_they_are(models[0].source, tensors, configs)
    _check_has_configs(models[0], anatomy)
    known = _known_prediction(models[0])
    guessed = None if known else anatomy.family.prediction.get(anatomy.inputs)
    guess = [] if guessed is None else [guessed.note]
    try:
        made = folder_configs(
            {tensor.name: tensor.shape for tensor in tensors},
            anatomy.family,
            variant=anatomy.variant,
            **(known if guessed is None else {"prediction": guessed.prediction}),
        )
    except UnknownFamilyError as error:
        raise IncompatibleModelsError(
            f"{shown(models[0].name)} cannot become a diffusers folder: it {error}"
        ) from None
    in_folder = _names_in_components(tensors)
    components = {tensor.name.partition("/")[0] for tensor in tensors}
    tokenizers = needed_tokenizers(anatomy.family.configs, components)
    source = _folder_of_configs(models, configs, tokenizers, anatomy.family.title)
    if source is None:
        _check_markers(models[0], made[SCHEDULER])
        _check_made(models[0], made, in_folder, anatomy.family)
        files = {path: _json(content) for path, content in made.items()}
        return files, [*_without_tokenizers(files, tokenizers), *guess]
    carried = {
        path: data
        for path, data in _carried(source).items()
        if path.count("/") == 0 or _belongs(path, components, source)
    }
    # What A's own configs say of A is not ours to correct.
    differing = _differing(carried, made, {} if source.path == models[0].source.path else in_folder)
    if configs is not None:
        _check_kind(differing, models[0], source, anatomy.family)
    unfit = {path for path, _ in differing}
    is_of_a_variant = is_of_flow(anatomy.family) and any(key in _OF_A_VARIANT for _, key in differing)
    if is_of_a_variant:
        unfit.add(SCHEDULER)
    fitting = {path: data for path, data in carried.items() if path not in unfit}
    ours = {path: made[path] for path in made.keys() - fitting.keys()}
    _check_made(models[0], ours, in_folder, anatomy.family)
    files = {path: _json(content) for path, content in made.items()} | fitting
    _check_markers(models[0], _parsed(files[SCHEDULER]) or {})
    notes = [] if SCHEDULER in carried else guess
    index = _index(files, made["model_index.json"], components, source, anatomy.family)
    if is_of_a_variant:
        index |= {key: made["model_index.json"][key] for key in ("_class_name", *_scheduler_in(ours))}
        notes.append(
            f"{shown(source.name)} is of another variant of {anatomy.family.title}: "
            f"{listing(sorted(unfit & carried.keys()))} and the pipeline's class are not taken from there"
        )
    if known and source.path != models[0].source.path:
        notes += _set_prediction(files, index, made[SCHEDULER], known, (models[0].name, source.name))
    notes += _otherwise(models[0], files[SCHEDULER])
    notes += _without_quantisation(files, tensors)
    files["model_index.json"] = _json(index)
    return files, [*_without_tokenizers(files, tokenizers), *notes]


def _as_they_are(
    source: DiffusersFolder, tensors: Sequence[NamedTensor], configs: CheckpointLike | None
) -> tuple[dict[str, bytes], list[str]]:
    """The small files of a folder of no known family: A's, since none can be made."""
    if configs is not None:
        raise IncompatibleModelsError(
            f"{shown(source.name)} is of no known family: its folder keeps its own configs, so leave out "
            "configs (--configs, of merge, bake and convert)"
        )
    if beside := sorted({one.name.partition("/")[0] for one in tensors} - source.components.keys()):
        raise IncompatibleModelsError(
            f"{shown(source.name)} has no {listing(beside)}, and no config is known for it: leave it out"
        )
    files = _carried(ConfigsFolder.of(source))
    return files, list(_without_quantisation(files, tensors))


def _check_kind(
    differing: Mapping[tuple[str, str], str], a: Model, source: ConfigsFolder, family: Family
) -> None:
    """Raise IncompatibleModelsError where configs that were asked for are of another kind of model."""
    faults = [
        f"{path} says {key} {values}" for (path, key), values in differing.items() if key not in _OF_A_VARIANT
    ]
    if faults:
        raise IncompatibleModelsError(
            f"{shown(source.name)} has configs of another kind of model than "
            f"{shown(a.name)} ({listing(faults)}): give a folder of {family.title}"
        )


def _set_prediction(
    files: dict[str, bytes],
    index: dict[str, Any],
    made: dict[str, Any],
    known: Mapping[str, Any],
    names: tuple[str, str],
) -> list[str]:
    """Make a carried scheduler say what is known of A's prediction; `names` are A's and the folder's."""
    scheduler = _scheduler(files[SCHEDULER], made, prediction_settings(**known))
    if scheduler == _parsed(files[SCHEDULER]):
        return []
    files[SCHEDULER] = _json(scheduler)
    if scheduler is made:
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    what = f"{scheduler['prediction_type']}, as {shown(names[0])} is marked"
    return [f"scheduler_config.json says {what}; that of {shown(names[1])} says otherwise"]


def _without_tokenizers(files: Mapping[str, bytes], needed: Mapping[str, str]) -> list[str]:
    """What the user is told where tokenizers are missing that the output's text encoders need."""
    missing = [
        f"{part} (that of {whose})" for part, whose in needed.items() if not tokenizer_class(files, part)
    ]
    if not missing:
        return []
    alone = ", or the tokenizer's folder alone" if len(needed) == 1 else ", or one that holds just these"
    return [
        f"warning: the new folder lacks {' and '.join(missing)}, which single files do not hold: "
        "loading it as a pipeline will fail, or prompts will not work. Give configs (--configs FOLDER), "
        f"a diffusers folder that has {'it' if len(missing) == 1 else 'them'}{alone}"
    ]


def _names_in_components(tensors: Sequence[NamedTensor]) -> dict[str, set[str]]:
    """{component: the names of its tensors there}."""
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        component, _, name = tensor.name.partition("/")
        found.setdefault(component, set()).add(name)
    return found


def _check_has_configs(a: Model, anatomy: Anatomy) -> None:
    """Raise IncompatibleModelsError where a folder has to be made, and cannot be for such a model."""
    if not anatomy.family.configs:
        raise IncompatibleModelsError(
            f"{shown(a.name)} is of {anatomy.family.title}, of which it is not known what a diffusers folder "
            "is to say: give another naming (--to, of merge, bake and convert)"
        )
    unfit = [one for one in anatomy.standing.derivatives if one.unfit_for_folders]
    if unfit and not is_pipeline(a.source):
        raise IncompatibleModelsError(
            f"{shown(a.name)} is {unfit[0].title} and cannot become a diffusers folder: "
            f"{unfit[0].unfit_for_folders}"
        )


def _scheduler_in(made: Mapping[str, Any]) -> list[str]:
    return ["scheduler"] if SCHEDULER in made else []


def _check_made(
    a: Model, made: Mapping[str, Mapping[str, Any]], in_folder: Mapping[str, set[str]], family: Family
) -> None:
    """Raise IncompatibleModelsError where diffusers, given a config, would not have exactly our tensors."""
    core = names_of_core(family, [f"{part}/{name}" for part, names in in_folder.items() for name in names])
    for path, config in made.items():
        component = path.partition("/")[0]
        names = in_folder.get(component)
        if names is not None and component in core:
            difference = _beside_each_other(core[component], names)
        else:
            difference = _not_as_in(config, names)
        if difference:
            what = f"no config makes exactly the tensors of its {TITLES.get(component, component)}"
            raise IncompatibleModelsError(
                f"{shown(a.name)} cannot become a diffusers folder: {what} ({difference})"
            )


def _not_as_in(config: Mapping[str, Any], names: set[str] | None) -> str:
    """In what the tensors that a config makes differ from those that there are; nothing where they do not, or
    where either is unknown.
    """
    try:
        wanted = names_in_config(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # somebody's own kind of config
        wanted = None
    return "" if wanted is None or names is None else _beside_each_other(wanted, names)


def _beside_each_other(wanted: Set[str], names: Set[str]) -> str:
    lacking = sorted(wanted - names)
    more = sorted(name for name in names - wanted if not is_position_ids(name))
    said = [f"{listing(lacking)} missing"] * bool(lacking) + [f"{listing(more)} beside them"] * bool(more)
    return "; ".join(said)


def _check_markers(a: Model, scheduler: Mapping[str, Any]) -> None:
    """Raise IncompatibleModelsError for markers, and what metadata say, of a prediction that the folder's
    scheduler does not have.
    """
    said = str(scheduler.get("_class_name", ""))
    unsaid = [
        marker
        for marker in _markers_of(a)
        if (wanted := a.anatomy.family.scheduler_of(marker)) is not None
        and (not wanted or not said.startswith(wanted))
    ]
    told = None if isinstance(a.source, DiffusersFolder) or _markers_of(a) else told_prediction(a)
    if told and told.prediction not in {*_SETTINGS, prediction_of_scheduler(scheduler)}:
        unsaid.append(f"{told.prediction} by its {told.where}")
    if unsaid:
        raise IncompatibleModelsError(
            f"{shown(a.name)} is marked {shown(unsaid[0])}, which the configs of a diffusers folder would "
            "not say, so that its pictures would be wrong: give a folder of such a model as configs "
            "(--configs)"
        )


def _markers_of(a: Model) -> list[str]:
    return sorted(name for name in a.tensors if is_prediction_marker(name))


def unsaid_in_a_file(a: Model) -> list[str]:
    """What a single file cannot say of A, as notes for the user.

    Raises CheckpointError when A's configs cannot be read.
    """
    told = told_prediction(a)
    usual = "flow" if is_of_flow(a.anatomy.family) else "epsilon"
    if told is None or told.prediction == usual or not is_pipeline(a.source) or _markers_of(a):
        return []
    return [
        f"warning: {shown(a.name)} predicts {shown(told.prediction)}, as its {shown(told.where)} says, but "
        "the single file cannot say so: set that prediction type in the program that loads it"
    ]


def _without_quantisation(files: dict[str, bytes], tensors: Sequence[NamedTensor]) -> Iterator[str]:
    """Take out of configs that weights are quantised which are written as plain ones, and say so."""
    packed = {
        one.name.partition("/")[0]
        for one in tensors
        if one.dtype not in FLOAT_DTYPES and not is_position_ids(one.name)
    }
    for component in sorted({one.name.partition("/")[0] for one in tensors} - packed):
        yield from of_plain_weights(files, f"{component}/config.json")


def of_plain_weights(files: dict[str, bytes], path: str) -> Iterator[str]:
    """Take out of a config that its weights are quantised, and say so."""
    config = _parsed(files.get(path, b""))
    if config is not None and config.pop(_QUANTISATION, None) is not None:
        files[path] = _json(config)
        yield f"{path}: {_QUANTISATION} is left out, since the weights written are plain numbers"


def _otherwise(a: Model, scheduler: bytes) -> list[str]:
    """Warn of a scheduler of another folder that says otherwise than A's own."""
    says = prediction_of_scheduler(_parsed(scheduler) or {})
    told = told_prediction(a) if isinstance(a.source, DiffusersFolder) else None
    if told is None or told.prediction == says:
        return []
    return [
        f"warning: scheduler_config.json says {shown(says)}, as that of the given configs does; "
        f"{shown(a.name)} predicts {shown(told.prediction)} by its {shown(told.where)}"
    ]


def _known_prediction(a: Model) -> dict[str, Any]:
    """What the U-Net predicts, as markers and metadata of a file tell it, where any scheduler can be set to
    it: arguments of `prediction_settings`, or none.
    """
    markers = _markers_of(a)
    if is_of_flow(a.anatomy.family) or any(
        a.anatomy.family.scheduler_of(marker) is not None for marker in markers
    ):
        return {}  # a setting is not enough
    if "v_pred" in markers:
        return {"prediction": "v_prediction", "zero_snr": "ztsnr" in markers}
    told = None if isinstance(a.source, DiffusersFolder) else told_prediction(a)
    return {"prediction": told.prediction} if told and told.prediction in _SETTINGS else {}


def _scheduler(carried: bytes, made: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A carried scheduler with what the model decides, or the one that is made where that cannot be had of
    it.
    """
    config = (_parsed(carried) or made) | settings
    is_unfit = prediction_of_scheduler(config) != settings["prediction_type"]
    if is_unfit or ("rescale_betas_zero_snr" in settings and config.get("_class_name") == "PNDMScheduler"):
        return made
    return config


def _folder_of_configs(
    models: Sequence[Model], configs: CheckpointLike | None, tokenizers: Mapping[str, str], family: str
) -> ConfigsFolder | None:
    if configs is not None:
        return ConfigsFolder.open(configs, tokenizers, family)
    return next((ConfigsFolder.of(model.source) for model in models if is_pipeline(model.source)), None)


def _carried(source: ConfigsFolder) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    size = 0
    for path, place in source.files.items():
        files[path] = read_small(place)
        size += len(files[path])
        if size > LARGEST_CARRIED:
            raise CheckpointError(
                f"{shown(source.path)}: its configs and tokenizers have more than "
                f"{LARGEST_CARRIED // 10**6} MB, which no model needs: take out what is none of them"
            )
    return files


def _belongs(path: str, components: set[str], source: ConfigsFolder) -> bool:
    """Whether a file's folder is one without weights, as a tokenizer's, or that of a component that the
    output has.
    """
    folder = path.partition("/")[0]
    return folder in components or folder not in source.components


def _differing(
    carried: Mapping[str, bytes],
    made: Mapping[str, Mapping[str, Any]],
    in_folder: Mapping[str, set[str]],
) -> dict[tuple[str, str], str]:
    """{(config, key): both values} for all that makes carried configs those of other tensors than the
    output's.
    """
    found = {}
    for component, keys in _STRUCTURE.items():
        path = f"{component}/config.json"
        if path not in carried or path not in made:
            continue
        config = _parsed(carried[path]) or {}
        for key in keys:
            # None, false and an empty list are the same where a key came later than a config.
            said, right = config.get(key) or None, made[path].get(key) or None
            if said != right:
                found[path, key] = f"{json.dumps(said)}, not {json.dumps(right)}"
        if difference := _not_as_in(config, in_folder.get(component)):
            found[path, "layers"] = f"that are not those of the tensors ({difference})"
    return found


def _index(
    files: Mapping[str, bytes],
    made: Mapping[str, Any],
    components: set[str],
    source: ConfigsFolder,
    family: Family,
) -> dict[str, Any]:
    """model_index.json with exactly the components, and at least the tokenizers, that the folder has."""
    index = _parsed(files["model_index.json"]) or dict(made)
    for part, entry in made.items():
        if part in components and index.get(part) in (None, [None, None]):
            index[part] = entry
    with_weights = {*source.components, *(prefix.rstrip("/") for prefix in family.prefixes["diffusers"])}
    index.update({part: [None, None] for part in index.keys() & with_weights - components})
    for part in made.keys() & {path.partition("/")[0] for path in files}:
        if index.get(part) in (None, [None, None]) and (found := tokenizer_class(files, part)):
            index[part] = found
    return index


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
