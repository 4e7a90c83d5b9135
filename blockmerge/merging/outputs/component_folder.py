"""The folder of one component alone, as language models and `transformer/` folders are: weights, a config,
and what else lies beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from blockmerge.anatomy import Anatomy
from blockmerge.checkpoints import Checkpoint, DiffusersFolder, Model
from blockmerge.errors import IncompatibleModelsError, OutputError, listing, shown
from blockmerge.merging.outputs.configs_folder import read_small
from blockmerge.merging.outputs.folder_files import of_plain_weights
from blockmerge.merging.outputs.output import FolderOutput, Layout, Tensor, Wish
from blockmerge.merging.outputs.shards import sharded


class ComponentFolder(FolderOutput):
    """A folder like A's, where A is the folder of a component alone."""

    title = "a component's folder"

    @classmethod
    def takes(cls, wish: Wish) -> bool:
        """Where A is one, and nothing but its own naming is asked for."""
        return is_lone_component(wish.a.source) and wish.naming in (None, wish.a.anatomy.naming)

    def naming_of(self, wish: Wish) -> str:
        """A's. Raises OutputError for what has more than the component."""
        if wish.is_whole:
            raise OutputError(
                f"{shown(wish.path)}: the folder of one component has no place for a VAE or text encoders; "
                "give the output a name that ends in .safetensors"
            )
        return wish.a.anatomy.naming

    def lay_out(self, tensors: Sequence[Tensor], models: Sequence[Model], anatomy: Anatomy) -> Layout[Tensor]:
        """The weights under their own names, and A's small files: its config, a tokenizer."""
        source = models[0].source
        assert is_lone_component(source)
        other = [
            one.name
            for one in tensors
            if one.name in source.tensors and source.tensors[one.name].shape != one.shape
        ]
        if other:
            raise IncompatibleModelsError(
                f"the config of {shown(models[0].name)} is not that of the output, which has other shapes "
                f"({listing(other)}): give the output a name that ends in .safetensors"
            )
        files, index = sharded({tensor.name: tensor for tensor in tensors}, source.components[""])
        beside = {name: read_small(source.path / name) for name in source.carried}
        notes = tuple(of_plain_weights(beside, "config.json"))
        return Layout(files, {**beside, **index}, notes)


def is_lone_component(source: Checkpoint) -> TypeGuard[DiffusersFolder]:
    """Whether a checkpoint is the folder of a component alone."""
    return isinstance(source, DiffusersFolder) and "" in source.components
