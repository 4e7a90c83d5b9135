"""A diffusers folder: a folder with weights for each component, cut into shards, and configs beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blockmerge.anatomy import Anatomy
from blockmerge.checkpoints import AtomicFolder, DiffusersFolder, Model, TensorInfo, check_output_folder
from blockmerge.merging.outputs.folder_files import folder_files
from blockmerge.merging.outputs.output import Layout, NamedTensor, Output, Tensor, WeightFile, Wish

SHARD_BYTES = 10_000_000_000
"""The largest weight file in a folder, as diffusers itself cuts them ("10GB")."""

_TRANSFORMERS_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


class DiffusersOutput(Output):
    """A folder of components in diffusers' naming. It may have any name."""

    title = "a diffusers folder"
    ending = ""
    is_default_of = "diffusers"
    has_configs = True
    names_components = True

    @classmethod
    def takes(cls, wish: Wish) -> bool:
        """Where it is asked for, and where A is one and nothing is asked for."""
        return wish.naming == "diffusers" or (wish.from_folder and wish.naming is None)

    def naming_of(self, wish: Wish) -> str:
        """Diffusers' own."""
        return "diffusers"

    def lay_out(self, tensors: Sequence[Tensor], models: Sequence[Model], anatomy: Anatomy) -> Layout[Tensor]:
        """Each component in its folder, where the component is no part of its tensors' names."""
        components: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            components.setdefault(tensor.name.partition("/")[0], []).append(tensor)
        files: list[WeightFile[Tensor]] = []
        indexes: dict[str, bytes] = {}
        for component, members in components.items():
            stem = _stem(component, models)
            shards = _shards(members)
            names = [f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
            if len(shards) == 1:
                names = [f"{stem}.safetensors"]
            else:
                indexes[f"{component}/{stem}.safetensors.index.json"] = _index(
                    dict(zip(names, shards, strict=True))
                )
            files += [
                WeightFile(f"{component}/{name}", {_in_component(tensor): tensor for tensor in shard})
                for name, shard in zip(names, shards, strict=True)
            ]
        beside, notes = folder_files(models, tensors, anatomy, self.configs)
        return Layout(files, {**beside, **indexes}, notes)

    def check(self, inputs: Iterable[Path], *, overwrite: bool = False) -> Path:
        """As `check_output_folder` does."""
        return check_output_folder(self.path, inputs, overwrite=overwrite)

    def reserve(
        self, target: Path, files: Mapping[str, int | bytes], *, overwrite: bool = False
    ) -> AtomicFolder:
        """Reserve all files of the folder."""
        return AtomicFolder(target, files, overwrite=overwrite)


def _in_component(tensor: NamedTensor) -> str:
    return tensor.name.partition("/")[2]


def _stem(component: str, models: Sequence[Model]) -> str:
    """How the names of a component's weight files begin: as in the first model that is a folder with it."""
    for model in models:
        if isinstance(model.source, DiffusersFolder) and component in model.source.components:
            return model.source.components[component]
    return _DIFFUSERS_STEM if component in ("unet", "vae") else _TRANSFORMERS_STEM


def _shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _index(shards: Mapping[str, Sequence[NamedTensor]]) -> bytes:
    """What tells a loader which of several files a tensor is in."""
    index = {
        "metadata": {"total_size": sum(_nbytes(tensor) for shard in shards.values() for tensor in shard)},
        "weight_map": {_in_component(tensor): name for name, shard in shards.items() for tensor in shard},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _nbytes(tensor: NamedTensor) -> int:
    return TensorInfo(tensor.dtype, tensor.shape, 0).nbytes
