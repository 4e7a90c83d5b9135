"""A diffusers folder: a folder with weights for each component, cut into shards, and configs beside them."""

from __future__ import annotations

from collections.abc import Sequence

from blockmerge.anatomy import Anatomy, Family
from blockmerge.anatomy.configs import library_of
from blockmerge.checkpoints import DiffusersFolder, Model
from blockmerge.merging.outputs.folder_files import folder_files
from blockmerge.merging.outputs.output import FolderOutput, Layout, Tensor, WeightFile, Wish
from blockmerge.merging.outputs.shards import sharded

_TRANSFORMERS_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


class DiffusersOutput(FolderOutput):
    """A folder of components in diffusers' naming. It may have any name."""

    title = "a diffusers folder"
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
            stem = stem_of(component, models, anatomy.family)
            own = {tensor.name.partition("/")[2]: tensor for tensor in members}
            shards, index = sharded(own, stem, f"{component}/")
            files += shards
            indexes |= index
        beside, notes = folder_files(models, tensors, anatomy, self.configs)
        return Layout(files, {**beside, **indexes}, notes)


def stem_of(component: str, models: Sequence[Model], family: Family) -> str:
    """How the names of a component's weight files begin: as in the first model that is a folder with it."""
    for model in models:
        if isinstance(model.source, DiffusersFolder) and component in model.source.components:
            return model.source.components[component]
    return _DIFFUSERS_STEM if library_of(family, component) == "diffusers" else _TRANSFORMERS_STEM
