"""The configuration files of a diffusers folder that is made from a single file, worked out from its tensors'
shapes.

What shapes do not tell (heads, activations, schedules) is that of the published folders, as each family's
description has it. Single files hold no tokenizer and no safety checker.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from blockmerge.anatomy.component_configs import Part, Shapes, component_config, fitting, of_diffusers
from blockmerge.anatomy.families import FAMILIES
from blockmerge.anatomy.family import Family

_FLOW = "flow"


def folder_configs(
    shapes: Shapes,
    family: Family | str,
    *,
    variant: str = "",
    prediction: str = "epsilon",
    zero_snr: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return {path in the folder: content} of model_index.json and of a config for each component and the
    scheduler.

    `shapes` are those of tensors in diffusers' names (``"unet/conv_in.weight"``), `family` is one of
    FAMILIES, of the model's size, or its name, and `variant` its kind as `Anatomy.variant` has it, by default
    what its input channels tell. `prediction` is ``"epsilon"`` or ``"v_prediction"``, where the family does
    not always predict the same; `zero_snr` says that the model is trained on a schedule that ends in pure
    noise (https://arxiv.org/abs/2305.08891). Raises UnknownFamilyError when a component lacks a tensor that
    tells how it is built.
    """
    family = _family(family)
    known = family.configs
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        component, _, rest = name.partition("/")
        parts.setdefault(component, {})[rest] = shape
    words = _words(family, shapes, variant)
    image_size = known["image_size"].get(prediction, known["image_size"]["epsilon"])
    configs = {
        component: component_config(
            Part(component, parts[component], words), described(family, component), image_size
        )
        for component in parts.keys() & known["components"].keys()
    }
    scheduler = scheduler_config(family, prediction, zero_snr=zero_snr, words=words)
    return {
        "model_index.json": model_index(family, configs, words, scheduler["_class_name"]),
        "scheduler/scheduler_config.json": scheduler,
    } | {f"{component}/config.json": configs[component] for component in sorted(configs)}


def model_index(
    family: Family | str, components: Collection[str], words: Collection[str], scheduler: str
) -> dict[str, Any]:
    """Return model_index.json: which class loads each component, and null for those that are not among
    `components`; `words` are for what kind of a model it is.
    """
    family = _family(family)
    known = family.configs
    made: Mapping[str, Any] = [known, *fitting(known.get("index", {}), words)][-1]
    pipeline: str = [*fitting(known["pipelines"], {"base", *words})][-1]
    index = of_diffusers(pipeline)
    for part in made["parts"]:
        index[part] = list(described(family, part)["class"]) if part in components else [None, None]
    index["scheduler"] = ["diffusers", scheduler]
    settings: dict[str, Any] = made["settings"]
    return index | settings


def scheduler_config(
    family: Family | str, prediction: str, *, zero_snr: bool = False, words: Collection[str] = ()
) -> dict[str, Any]:
    """Return the published scheduler of a family, with the schedule of noise that all of them were trained
    on.
    """
    known = _family(family).configs
    if is_of_flow(family):
        settings: dict[str, Any] = {}
        for one in fitting(known["scheduler"][_FLOW], {"base", *words}):
            settings |= one
        return of_diffusers(settings.pop("_class_name")) | settings
    kind = "v_prediction" if prediction == "v_prediction" or zero_snr else "epsilon"
    made: dict[str, Any] = dict(known["scheduler"][kind])
    named = of_diffusers(made.pop("_class_name"))
    noise: dict[str, Any] = known["noise"]
    return named | made | noise | prediction_settings(prediction, zero_snr=zero_snr)


def is_of_flow(family: Family | str) -> bool:
    """Whether all models of a family predict the flow from noise to image, so that no setting says so."""
    return _FLOW in _family(family).configs.get("scheduler", {})


def prediction_settings(prediction: str, *, zero_snr: bool = False) -> dict[str, Any]:
    """Return what of a scheduler's config the model decides, whatever the scheduler."""
    if not zero_snr:
        return {"prediction_type": prediction}
    # The paper's: the last step must be among those taken.
    return {"prediction_type": prediction, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def described(family: Family, component: str) -> Mapping[str, Any]:
    """What a family says of a component's config, with what it is said to be `like`."""
    own: dict[str, Any] = family.configs["components"][component]
    if "like" not in own:
        return own
    shared = _shared(own["like"])
    return {
        key: shared[key] | own[key] if key in own and isinstance(shared.get(key), dict) else value
        for key, value in (shared | own).items()
    }


def library_of(family: Family, component: str) -> str | None:
    """The library that has the class of a component, None for those that the family does not know."""
    if component not in family.configs.get("components", {}):
        return None
    library: str = described(family, component)["class"][0]
    return library


def names_of_core(family: Family, have: Collection[str]) -> dict[str, set[str]]:
    """Return {component: names of all tensors} of a family's transformer in diffusers naming, with what not
    all models have where some of it is among `have`; nothing for U-Nets, whose sizes only configs tell.
    """
    if family.arms:
        return {}
    places = set(family.origins(family.unet, "ldm", "diffusers"))
    beside = set(family.origins(family.beside_layout, "ldm", "diffusers"))
    found: dict[str, set[str]] = {}
    for place in places | (beside if beside & set(have) else set()):
        component, _, name = place.partition("/")
        found.setdefault(component, set()).add(name)
    return found


def latent_channels(family: Family) -> int | None:
    """How many channels the latent images have that a family's VAE makes, where its description says so."""
    if "vae" not in family.configs.get("components", {}):
        return None
    return described(family, "vae").get("latent_channels")


@lru_cache(None)
def _shared(name: str) -> dict[str, Any]:
    """A component that several families have."""
    home = files("blockmerge.anatomy.families").joinpath("_components")
    return tomllib.loads(home.joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def _family(family: Family | str) -> Family:
    return FAMILIES[family] if isinstance(family, str) else family


def _words(family: Family, shapes: Shapes, variant: str) -> set[str]:
    """The words for what kind of a model it is: its variant's, its version, and how many members its lists
    have.
    """
    first = shapes.get(family.unet_prefix("diffusers") + family.signs["diffusers"].first, ())
    inputs = family.variants.get(first[1], "base") if len(first) > 1 else "base"
    return {*(variant or inputs).split(), family.version, *map(str, family.counts)}
