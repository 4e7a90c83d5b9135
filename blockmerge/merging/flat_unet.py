"""A U-Net's parameters in flat buffers, block after block, and models laid out the same way.

Loads torch: imported late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from blockmerge.anatomy import Family, Origin, canonical_names, component_of, core_of
from blockmerge.checkpoints import Model, Readers, StateDict, TensorInfo, made, state_dict_name
from blockmerge.dtypes import DTYPES, FLOAT_DTYPES, torch_dtype
from blockmerge.errors import IncompatibleModelsError, RecipeError, counted, listing, shown
from blockmerge.expressions import Dequantised, Expression, Stored, simplify
from blockmerge.merging.devices import first_line
from blockmerge.merging.in_memory import fit_for, tensor_of
from blockmerge.streaming import aligned_buffer
from blockmerge.streaming.tensors import tensor_view

_ALIGNMENT = 256  # bytes: what GPUs fetch at once, and more than any kernel asks for
_MOST_BYTES = 2 << 30
"""The size of a flat buffer, unless a parameter is larger: Apple's GPUs have no larger ones than a part of
their memory, and elsewhere a few buffers are as good as one.
"""
_MODULE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DTYPE_NAMES = {torch_dtype(name): name for name in DTYPES if DTYPES[name].torch}
_COMPILED = "_orig_mod."  # torch.compile wraps a module, and its names


Buffers = tuple[torch.Tensor, ...]
"""Flat memory for a U-Net: one buffer, or several where that would be large."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter in the flat buffer of number `buffer`: `offset`, `shape` and `strides` in
    elements.

    `name` is the module's own for it; `origin` says how it is made of the tensor that LDM calls `ldm`.
    """

    name: str
    ldm: str
    origin: Origin
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    buffer: int
    offset: int

    @property
    def end(self) -> int:
        """The element after the last."""
        return self.offset + prod(self.shape)

    def of(self, buffers: Buffers) -> torch.Tensor:
        """The parameter in flat buffers, a view in its own shape."""
        return buffers[self.buffer].as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Block:
    """A block's slots, one behind the other in flat buffers."""

    name: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True, eq=False)
class FlatModel:
    """A model in flat buffers under the module's names: a source of tensors, as a checkpoint is.

    A tensor has the model's own shape, which may have fewer input channels than the slot that it lies in.
    """

    name: str
    buffers: Buffers
    slots: Mapping[str, Slot]
    tensors: Mapping[str, TensorInfo]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, a view in the model's own shape."""
        whole, shape = self.slots[name].of(self.buffers), self.tensors[name].shape
        return whole if whole.shape == shape else whole[:, : shape[1]]

    def in_ldm(self, tensor: Expression) -> Expression:
        """What a tensor of the module under an LDM name is in this model."""
        if isinstance(tensor, Stored):
            info = self.tensors[tensor.name]
            shape = tensor.shape if info.shape == self.slots[tensor.name].shape else info.shape
            return Stored(self, tensor.name, info.dtype, shape, tensor.begin)
        return tensor.with_inputs(tuple(map(self.in_ldm, tensor.inputs)))


@dataclass(frozen=True)
class FlatUNet:
    """The parameters of a U-Net module, and where each lies in flat buffers of so many elements, `sizes`.

    Blocks follow one another without gaps in the order of the family's; every slot begins at a multiple of
    256 bytes. `tensors` are the module's under LDM names.
    """

    family: Family
    tensors: Mapping[str, Expression]
    parameters: Mapping[str, torch.nn.Parameter]
    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, module: torch.nn.Module, models: Sequence[Model]) -> FlatUNet:
        """Lay out a module's parameters for a merge of `models`, which are held against it.

        Raises UnknownFamilyError for a module that is no U-Net; RecipeError for parameters that cannot become
        views of flat memory; CheckpointError for meta tensors; IncompatibleModelsError for models that do
        not fit.
        """
        parameters = _unet_parameters(module)
        _check_parameters(parameters)
        unet = Model.of(StateDict(parameters, "the module"))
        names = {ldm: unet.names_in_file(ldm)[0] for ldm in unet.tensors}
        _refuse_adapters([name for ldm, name in names.items() if "/" in ldm])  # names that LDM does not have
        if tied := _tied(parameters):
            raise RecipeError(
                f"the module's parameters share memory, and cannot be merged on their own: {listing(tied)}"
            )
        _the_one("device", {name: parameter.device for name, parameter in parameters.items()})
        dtype = _the_one("dtype", {name: parameter.dtype for name, parameter in parameters.items()})
        if dtype not in _MODULE_DTYPES:
            raise RecipeError(f"the module's parameters are {dtype}: LiveMerge works in fp16, bf16 and fp32")
        _check_models(unet, models, names)
        places = _places(unet, parameters)
        blocks, sizes = _lay_out(
            unet.anatomy.family,
            places,
            parameters,
            alignment=_ALIGNMENT // dtype.itemsize,
            most=_MOST_BYTES // dtype.itemsize,
        )
        return cls(unet.anatomy.family, unet.tensors, parameters, blocks, sizes)

    def shares_parameters(self, other: FlatUNet) -> bool:
        """Whether the two are of one module, or have some of it in common."""
        return not {*map(id, self.parameters.values())}.isdisjoint(map(id, other.parameters.values()))

    @property
    def slots(self) -> Iterator[Slot]:
        """All slots, block after block."""
        return (slot for block in self.blocks for slot in block.slots)

    def copies(self, models: Sequence[Model]) -> tuple[list[FlatModel], Buffers]:
        """Return every model in flat memory, in the module's dtype and on its device, and buffers that the
        module may hold: A.

        Of a first convolution, the input channels that A lacks are in the last from the first model that has
        them. Raises CheckpointError when a model cannot be read, RecipeError when there is no room.
        """
        *flats, out = self._empty(len(models) + 1)
        copies = [
            self._copied(buffers, model, state_dict_name(number).removeprefix("state dict "))
            for number, (buffers, model) in enumerate(zip(flats, models, strict=True))
        ]
        for buffer, of_a in zip(out, flats[0], strict=True):
            buffer.copy_(of_a)
        for slot in self.slots:
            whole = next(one for one in copies if one.tensors[slot.name].shape == slot.shape)
            if whole is not copies[0]:
                channels = copies[0].tensors[slot.name].shape[1]
                slot.of(out)[:, channels:] = slot.of(whole.buffers)[:, channels:]
        return copies, out

    def _copied(self, buffers: Buffers, model: Model, letter: str) -> FlatModel:
        """Fill flat buffers with a model, from the front of its files to the back."""
        dtype = buffers[0].dtype
        slots = {slot.name: slot for slot in self.slots}
        wanted = {slot.name: simplify(made(slot.origin, model.tensors, model.name)) for slot in self.slots}
        tensors: dict[str, TensorInfo] = {}
        for name, tensor in wanted.items():
            slot, shape = slots[name], tensor.shape
            if shape != slot.shape:  # the channels that both have
                shape = (shape[0], min(shape[1], slot.shape[1]), *shape[2:])
            tensors[name] = TensorInfo(_DTYPE_NAMES[dtype], shape, slot.offset * dtype.itemsize)
        copy = FlatModel(letter, buffers, slots, tensors)
        for name, values in _read(model, dict(sorted(wanted.items(), key=lambda item: _offset(item[1])))):
            target = copy.tensor(name)
            values = values if values.shape == target.shape else values[:, : target.shape[1]]
            target.copy_(fit_for(target.device, values))
        return copy

    def place(self, buffers: Buffers) -> dict[str, torch.Tensor]:
        """Make the parameters views of flat buffers, and return what they were of."""
        originals = {slot.name: self.parameters[slot.name].data for slot in self.slots}
        for slot in self.slots:
            self.parameters[slot.name].data = slot.of(buffers)
        return originals

    def moved(self, buffers: Buffers, names: Collection[str]) -> list[str]:
        """Return those parameters of the named blocks that are no longer where `place` has put them."""
        starts, size = [buffer.data_ptr() for buffer in buffers], buffers[0].itemsize
        slots = (slot for block in self.blocks if block.name in names for slot in block.slots)
        return [
            slot.name
            for slot in slots
            if self.parameters[slot.name].data_ptr() != starts[slot.buffer] + slot.offset * size
        ]

    def _empty(self, count: int) -> list[Buffers]:
        parameter = next(iter(self.parameters.values()))
        dtype, device = parameter.dtype, parameter.device
        try:
            return [
                tuple(torch.zeros(size, dtype=dtype, device=device) for size in self.sizes)
                for _ in range(count)
            ]
        except RuntimeError as error:
            size = sum(self.sizes) * parameter.itemsize / 1e9
            raise RecipeError(
                f"{device} has no room for {count} U-Nets of {size:.2f} GB each: {first_line(error)}"
            ) from error


def _unet_parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    if not isinstance(module, torch.nn.Module):
        raise RecipeError(
            f"a {type(module).__name__} is not a torch module: "
            "give the U-Net itself, as in LiveMerge(pipe.unet, a, b)"
        )
    named = {
        name.replace(_COMPILED, ""): found for name, found in module.named_parameters(remove_duplicate=False)
    }
    spelled = canonical_names(named, core_of(named))
    return {name: found for name, found in named.items() if component_of(spelled[name]) == "unet"}


def _refuse_adapters(names: Sequence[str]) -> None:
    if names:
        raise RecipeError(
            f"the module has {counted(len(names), 'parameter')} that no plain U-Net has ({listing(names)}): "
            "take its LoRAs and other adapters off first; they can be put on again afterwards"
        )


def _check_parameters(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    # These change the names of what they adapt, so that the U-Net itself would not be seen.
    _refuse_adapters([name for name in parameters if ".base_layer." in name or ".lora_" in name])
    # Quantised weights are subclasses with a memory of their own kind.
    if special := [
        (name, found) for name, found in parameters.items() if type(found) is not torch.nn.Parameter
    ]:
        names, kind = [name for name, _ in special], type(special[0][1]).__name__
        raise RecipeError(
            f"the module's weights are not plain tensors ({kind}: "
            f"{listing(names)}): load it without quantisation to merge it live"
        )


def _tied(parameters: Mapping[str, torch.nn.Parameter]) -> list[str]:
    places: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.numel():
            places.setdefault(parameter.data_ptr(), []).append(name)
    return [" = ".join(map(shown, names)) for names in places.values() if len(names) > 1]


def _the_one(what: str, found: Mapping[str, Any]) -> Any:
    first_with: dict[Any, str] = {}
    for name, value in found.items():
        first_with.setdefault(value, name)
    if len(first_with) > 1:
        said = listing(f"{name} {value}" for value, name in first_with.items())
        raise RecipeError(f"the module's parameters are of several {what}s ({said}): give it one with .to()")
    return next(iter(first_with))


def _check_models(unet: Model, models: Sequence[Model], names: Mapping[str, str]) -> None:
    """Raise IncompatibleModelsError unless every model has the module's U-Net; `names` are the module's own
    by LDM name.
    """
    for model in models:
        ours, theirs = unet.anatomy.family, model.anatomy.family
        if not (ours.is_like(theirs) or (theirs.lives_in, theirs.blocks) == (ours.name, ours.blocks)):
            raise IncompatibleModelsError(
                f"the module is {ours.title} and {shown(model.name)} is {theirs.title}"
            )
    faults = []
    for model in models:
        found = {
            ldm: info
            for ldm, info in model.tensors.items()
            if component_of(ldm) == "unet" and (ldm in names or not _is_elsewhere(ldm, model.anatomy.family))
        }
        if lacking := [name for ldm, name in names.items() if ldm not in found]:
            faults.append(
                f"{shown(model.name)} lacks {counted(len(lacking), 'tensor')} "
                f"of the module ({listing(lacking)})"
            )
        if more := [model.names_in_file(ldm)[0] for ldm in found if ldm not in names]:
            faults.append(
                f"the module lacks {counted(len(more), 'tensor')} of {shown(model.name)} ({listing(more)})"
            )
        wrong = []
        for ldm in found.keys() & names.keys():
            info, shape = found[ldm], unet.tensors[ldm].shape
            if info.dtype not in FLOAT_DTYPES:
                wrong.append(f"{shown(names[ldm])} holds {info.dtype}")
            elif info.shape != shape and not _differs_in_channels(
                ldm, info.shape, shape, unet.anatomy.family
            ):
                wrong.append(
                    f"{shown(names[ldm])} has shape {shown(list(info.shape))}, the module's is {list(shape)}"
                )
        if wrong:
            faults.append(f"in {shown(model.name)}, {listing(sorted(wrong), width=200)}")
    input_layer = unet.anatomy.family.input_layer
    first = unet.tensors[input_layer].shape
    if not faults and all(model.tensors[input_layer].shape[1] < first[1] for model in models):
        faults.append(
            f"{names[input_layer]} of the module takes {first[1]} channels, and no model has so many"
        )
    if faults:
        raise IncompatibleModelsError(f"these models do not fit the module: {'; '.join(faults)}")


def _is_elsewhere(ldm: str, family: Family) -> bool:
    """Whether a tensor is none of the module's parameters: a table that training leaves alone, what nothing
    uses, or a part that is a module of its own.
    """
    main = family.unet_prefix("diffusers")
    places = family.relation_of(ldm).diffusers  # of what nobody knows there are none
    return family.may_lack(ldm) or (bool(places) and not any(place.startswith(main) for place in places))


def _differs_in_channels(ldm: str, shape: tuple[int, ...], wanted: tuple[int, ...], family: Family) -> bool:
    """Whether it is the first convolution and differs in input channels alone, beyond those that all have."""
    if ldm != family.input_layer or (shape[0], *shape[2:]) != (wanted[0], *wanted[2:]):
        return False
    return family.shared_channels in (shape[1], wanted[1])


def _places(unet: Model, parameters: Iterable[str]) -> dict[str, tuple[str, Origin]]:
    """{the module's own name: the LDM tensor that it is of, and how it is made of that}."""
    family, naming = unet.anatomy.family, unet.anatomy.naming
    spelled = canonical_names(names := tuple(parameters), core_of(names))
    own = {spelled[name]: name for name in names}
    return {
        own[place]: (ldm, origin)
        for ldm in unet.tensors
        for place, origin in family.origins((ldm,), "ldm", naming).items()
    }


def _lay_out(
    family: Family,
    places: Mapping[str, tuple[str, Origin]],
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    alignment: int,
    most: int,
) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    blocks: dict[str, list[Slot]] = {block: [] for block in family.blocks}
    sizes = [0]

    def order(name: str) -> tuple[int, bool]:
        # A first convolution that not all models have whole is merged on its own: first in its block, it
        # parts nothing.
        ldm, _ = places[name]
        return family.blocks.index(family.block_of(ldm)), ldm != family.input_layer

    for name in sorted(places, key=order):
        ldm, origin = places[name]
        # Of a tensor whose elements lie densely in another order (channels_last), `empty_like` keeps that
        # order.
        strides = torch.empty_like(parameters[name], device="meta").stride()
        elements = -(-parameters[name].numel() // alignment) * alignment
        if sizes[-1] and sizes[-1] + elements > most:
            sizes.append(0)
        slot = Slot(name, ldm, origin, tuple(parameters[name].shape), strides, len(sizes) - 1, sizes[-1])
        blocks[family.block_of(ldm)].append(slot)
        sizes[-1] += elements
    return tuple(Block(name, tuple(slots)) for name, slots in blocks.items() if slots), tuple(sizes)


def _read(model: Model, tensors: Mapping[str, Expression]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors of a model in their shapes; the memory of one may be the next's."""
    if isinstance(model.source, StateDict):  # on whatever device: their bytes need not come through the CPU
        yield from ((name, tensor_of(tensor)) for name, tensor in tensors.items())
        return
    buffer = aligned_buffer(max(tensor.nbytes for tensor in tensors.values()))
    with Readers() as readers:
        for name, tensor in tensors.items():
            if tensor.elements:
                readers.read_into(tensor, 0, buffer[: tensor.nbytes])
                yield name, tensor_view(buffer, tensor.dtype, tensor.elements).view(tensor.shape)
    model.source.check_unchanged()


def _offset(tensor: Expression) -> int:
    """Where a tensor begins in its file."""
    tensor = tensor.codes if isinstance(tensor, Dequantised) else tensor
    return tensor.offset if isinstance(tensor, Stored) else 0
