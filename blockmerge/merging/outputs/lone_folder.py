"""The folder of one component that was taken out of a model, or that was a file: weights and a config, as
`from_pretrained` of its class takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blockmerge.anatomy import Anatomy, Family
from blockmerge.anatomy.configs import described, folder_configs
from blockmerge.checkpoints import Model
from blockmerge.errors import IncompatibleModelsError, UnknownFamilyError, listing, shown
from blockmerge.merging.outputs.component_folder import ComponentFolder, is_lone_component
from blockmerge.merging.outputs.configs_folder import ConfigsFolder, is_pipeline, read_small
from blockmerge.merging.outputs.folder import stem_of
from blockmerge.merging.outputs.folder_files import of_plain_weights
from blockmerge.merging.outputs.output import Layout, Tensor, Wish
from blockmerge.merging.outputs.shards import sharded

_CONFIG = "config.json"
_STRUCTURE = (
    "in_channels", "latent_channels", "block_out_channels", "cross_attention_dim", "num_layers",
    "hidden_size", "num_hidden_layers",
)  # fmt: skip
"""By which keys a config is known to be that of other tensors."""

_SCALE = ("scaling_factor", "shift_factor")


class LoneFolder(ComponentFolder):
    """A folder like ``vae/`` of a diffusers folder, with nothing else."""

    is_default_of = ""
    has_configs = True

    @classmethod
    def takes(cls, wish: Wish) -> bool:
        """Where A is one component, and its folder is asked for, or A is in a folder itself."""
        in_diffusers = (wish.naming or wish.a.anatomy.naming) == "diffusers"
        return wish.a.alone is not None and in_diffusers

    def naming_of(self, wish: Wish) -> str:
        """Diffusers' own."""
        return "diffusers"

    def lay_out(self, tensors: Sequence[Tensor], models: Sequence[Model], anatomy: Anatomy) -> Layout[Tensor]:
        """The weights, and a config: the one of `configs`, A's own, or one made from the shapes.

        Raises IncompatibleModelsError where none can be made, or the one of `configs` is of another kind.
        """
        (a,) = models
        assert a.alone is not None
        if is_lone_component(a.source) and self.configs is None:
            return super().lay_out(tensors, models, anatomy)
        folder = a.alone.folder
        if beside := [one.name for one in tensors if "/" in one.name]:
            raise IncompatibleModelsError(
                f"{shown(a.name)} has its {anatomy.family.core_title} in two folders ({listing(beside)}): "
                "give the output a name that ends in .safetensors"
            )
        files, index = sharded(
            {tensor.name: tensor for tensor in tensors}, stem_of(folder, models, anatomy.family)
        )
        beside_it, notes = self._beside(tensors, a, anatomy)
        return Layout(files, {**beside_it, **index}, (*notes, *of_plain_weights(beside_it, _CONFIG)))

    def _beside(
        self, tensors: Sequence[Tensor], a: Model, anatomy: Anatomy
    ) -> tuple[dict[str, bytes], Sequence[str]]:
        assert a.alone is not None
        folder = a.alone.folder
        if self.configs is not None:
            carried = _of_folder(ConfigsFolder.open(self.configs, {}, anatomy.family.title), folder)
            if _CONFIG not in carried:
                raise IncompatibleModelsError(
                    f"{shown(self.configs)} has no {folder}/{_CONFIG}: "
                    "give another as configs (--configs, of convert)"
                )
            made = _made(tensors, a, anatomy, folder)
            config = _check_kind(carried[_CONFIG], made, a.name, str(self.configs))
            is_known = a.alone.is_part  # of a VAE that was a file, the family is a guess
            return carried, _other_scale(config, made, anatomy, str(self.configs)) if is_known else ()
        if is_pipeline(a.source):
            return _of_folder(ConfigsFolder.of(a.source), folder), ()
        made = _made(tensors, a, anatomy, folder)
        data = (json.dumps(made, indent=2) + "\n").encode()
        return {_CONFIG: data}, _ambiguous(made, folder, anatomy.family, a.alone.others)


def _of_folder(source: ConfigsFolder, folder: str) -> dict[str, bytes]:
    """The small files of a component's folder."""
    start = f"{folder}/"
    return {
        path.removeprefix(start): read_small(place)
        for path, place in source.files.items()
        if path.startswith(start)
    }


def _made(tensors: Sequence[Tensor], a: Model, anatomy: Anatomy, folder: str) -> Mapping[str, Any]:
    shapes = {f"{folder}/{one.name}": one.shape for one in tensors}
    try:
        made = folder_configs(shapes, anatomy.family, variant=anatomy.variant)
        return made[f"{folder}/{_CONFIG}"]
    except (UnknownFamilyError, KeyError) as error:
        why = f"it {error}" if isinstance(error, UnknownFamilyError) else "no config is known for it"
        raise IncompatibleModelsError(f"{shown(a.name)} cannot become a component's folder: {why}") from None


def _check_kind(data: bytes, made: Mapping[str, Any], name: str, configs: str) -> Mapping[str, Any]:
    try:
        config = json.loads(data)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise IncompatibleModelsError(f"{shown(configs)}: its {_CONFIG} is no JSON object")
    differing = [
        f"{key} {json.dumps(config[key])}, not {json.dumps(made[key])}"
        for key in _STRUCTURE
        if key in config and key in made and config[key] != made[key]
    ]
    if differing:
        raise IncompatibleModelsError(
            f"the config of {shown(configs)} is not that of {shown(name)}: {listing(differing)}"
        )
    return config


def _other_scale(
    config: Mapping[str, Any], made: Mapping[str, Any], anatomy: Anatomy, configs: str
) -> Sequence[str]:
    """Say where a VAE gets latent images of another scale than its family's: no shape shows it."""
    differing = [
        f"{key} {json.dumps(config[key])}, not {json.dumps(made[key])}"
        for key in _SCALE
        if config.get(key) is not None and made.get(key) is not None and config[key] != made[key]
    ]
    if not differing:
        return ()
    title = anatomy.family.title
    return (f"warning: {_CONFIG}, of {shown(configs)}, is not as in {title}: {listing(differing)}",)


def _ambiguous(
    made: Mapping[str, Any], folder: str, family: Family, others: Sequence[Family]
) -> Sequence[str]:
    """Say where families that have the very same tensors have other settings."""
    ours = _settings(family, folder)
    differing = list(dict.fromkeys(one.title for one in others if _settings(one, folder) != ours))
    if not differing:
        return ()
    return (
        f"{_CONFIG} is that of {family.title}; the tensors are also those of {listing(differing, 9)}, whose "
        "settings differ: configs (--configs, of convert) takes those of a folder",
    )


def _settings(family: Family, folder: str) -> Mapping[str, Any] | None:
    known = family.configs.get("components", {})
    return described(family, folder) if folder in known else None
