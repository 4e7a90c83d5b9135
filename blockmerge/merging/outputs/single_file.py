"""A single `.safetensors` file: a whole model in LDM naming, or one component alone in either."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blockmerge.anatomy import Anatomy
from blockmerge.checkpoints import AtomicFile, Model, check_output
from blockmerge.errors import OutputError, shown
from blockmerge.merging.outputs.folder_files import unsaid_in_a_file
from blockmerge.merging.outputs.output import Layout, Output, Tensor, WeightFile, Wish


class SingleFile(Output):
    """One file that ends in `.safetensors`."""

    title = "a single file"
    ending = ".safetensors"
    is_default_of = "ldm"

    @classmethod
    def takes(cls, wish: Wish) -> bool:
        """By its ending, unless it is the name of a folder."""
        return wish.path.lower().endswith(cls.ending) and not os.path.isdir(wish.path)

    def naming_of(self, wish: Wish) -> str:
        """A's, or LDM's where A is a whole model of diffusers. Raises OutputError for such a one."""
        naming = wish.naming or self._usual_naming(wish)
        if naming == "diffusers" and wish.is_whole:
            raise OutputError(
                f"{shown(wish.path)}: a whole model under diffusers' names is a folder; "
                "give a folder, or naming='ldm' (--to ldm, of merge, bake and convert)"
            )
        return naming

    @staticmethod
    def _usual_naming(wish: Wish) -> str:
        alone = wish.a.alone
        if alone is not None and alone.is_part and alone.folder.startswith("text_encoder"):
            return "diffusers"  # as text encoders are published: transformers' names
        return "ldm" if wish.is_whole or wish.from_folder else wish.a.anatomy.naming

    def lay_out(self, tensors: Sequence[Tensor], models: Sequence[Model], anatomy: Anatomy) -> Layout[Tensor]:
        """All tensors under their own names."""
        file = WeightFile("", {tensor.name: tensor for tensor in tensors})
        has_core = "unet" in models[0].components
        return Layout((file,), notes=unsaid_in_a_file(models[0]) if has_core else ())

    def check(self, inputs: Iterable[Path], *, overwrite: bool = False) -> Path:
        """As `check_output` does."""
        return check_output(self.path, inputs, overwrite=overwrite)

    def reserve(
        self, target: Path, files: Mapping[str, int | bytes], *, overwrite: bool = False
    ) -> AtomicFile:
        """Reserve the one file."""
        (size,) = files.values()
        assert isinstance(size, int)
        return AtomicFile(target, size, overwrite=overwrite)
