"""A model under diffusers' names, made by the relations that `test_renaming` holds against diffusers' own converters."""

from __future__ import annotations

from blockmerge.anatomy import FAMILIES
from blockmerge.checkpoints import TensorInfo, made
from blockmerge.dtypes import DTYPES, torch_dtype
from blockmerge.expressions import Stored
from blockmerge.merging.in_memory import tensor_of

_NAMES = {torch_dtype(name): name for name, dtype in DTYPES.items() if dtype.torch}


class Held:
    """Tensors in memory, the meta device's too, as a source."""

    name = "the model"

    def __init__(self, model):
        self.model = model
        self.tensors = {
            name: TensorInfo(_NAMES[one.dtype], tuple(one.shape), 0) for name, one in model.items()
        }

    def tensor(self, name):
        return self.model[name]


def in_diffusers(model, family):
    """{``component/name``: tensor} of a model in LDM names; its tensors are its own."""
    source = Held(model)
    tensors = {name: Stored.of(source, name) for name in model}
    origins = FAMILIES[family].origins(model, "ldm", "diffusers")
    return {
        place: tensor_of(made(origin, tensors, source.name)).contiguous().clone()
        for place, origin in origins.items()
    }
