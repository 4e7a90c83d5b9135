"""State dicts in memory as checkpoints: each tensor gets a place in an imagined file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from blockmerge.checkpoints.checkpoint import Checkpoint, Reader, TensorInfo
from blockmerge.dtypes import DTYPES, torch_dtype
from blockmerge.errors import CheckpointError, shown

if TYPE_CHECKING:
    import torch


def state_dict_name(number: int) -> str:
    """Return what messages call one of several state dicts: ``"state dict A"``, or a number where letters
    end.
    """
    return f"state dict {chr(ord('A') + number) if number < 26 else number + 1}"


class StateDict(Checkpoint):
    """A dict of tensors, on any device, seen as a checkpoint. The tensors are not copied, and not changed.

    Raises CheckpointError for entries that are no tensors or have a dtype that safetensors files cannot hold.
    """

    def __init__(self, state_dict: Mapping[str, torch.Tensor], name: str = "state dict") -> None:
        import torch

        spelling = {torch_dtype(name): name for name, dtype in DTYPES.items() if dtype.torch}
        self.name = name
        self.metadata = {}
        self.state_dict = dict(state_dict)
        tensors = {}
        offset = 0
        for key, tensor in self.state_dict.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{shown(name)} has the name {shown(key)}, which is a {type(key).__name__}, not a text"
                )
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.layout != torch.strided
                or tensor.dtype not in spelling
            ):
                what = (
                    f"a {tensor.dtype} tensor"
                    if isinstance(tensor, torch.Tensor)
                    else f"a {type(tensor).__name__}"
                )
                raise CheckpointError(
                    f"{shown(name)}: {shown(key)} is {what}, which cannot be merged or copied"
                )
            if tensor.is_meta:
                raise CheckpointError(f"{shown(name)}: {shown(key)} is a meta tensor, which has no values")
            tensors[key] = TensorInfo(spelling[tensor.dtype], tuple(tensor.shape), offset)
            offset += tensor.numel() * tensor.element_size()
        self.tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, without its history."""
        return self.state_dict[name].detach()

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of several tensors; those on one device come from there together."""
        import torch

        by_device: dict[torch.device, list[str]] = {}
        for name in names:
            by_device.setdefault(self.state_dict[name].device, []).append(name)
        found: dict[str, bytes] = {}
        for group in by_device.values():
            flat = [self.tensor(name).contiguous().flatten().view(torch.uint8) for name in group]
            parts = torch.split(torch.cat(flat).cpu(), [len(one) for one in flat])
            found.update((name, part.numpy().tobytes()) for name, part in zip(group, parts, strict=True))
        return found

    def reader(self) -> StateDictReader:
        """Open a reader of the tensors' bytes."""
        return StateDictReader(self)


class StateDictReader(Reader):
    """Reads from tensors in memory as if they stood one behind the other in a file."""

    def __init__(self, source: StateDict) -> None:
        filled = [(info.offset, name) for name, info in source.tensors.items() if info.nbytes]
        self._offsets = [offset for offset, _ in filled]
        self._names = [name for _, name in filled]
        self._tensors = source.state_dict
        self._last: tuple[int, torch.Tensor | None] = (-1, None)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        import torch

        if not len(buffer):
            return
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        index = bisect_right(self._offsets, offset) - 1
        done = 0
        while done < len(target):
            data = self._bytes_of(index)
            skip = offset + done - self._offsets[index]
            part = data[skip : skip + len(target) - done]
            target[done : done + len(part)].copy_(part)
            done += len(part)
            index += 1

    def close(self) -> None:
        """Let go of the tensor that was read last."""
        self._last = (-1, None)

    def _bytes_of(self, index: int) -> torch.Tensor:
        """A tensor's bytes in a row; only one that is not contiguous is copied for it, and once for all its
        chunks.
        """
        import torch

        last, data = self._last
        if last != index or data is None:
            data = self._tensors[self._names[index]].detach().contiguous().flatten().view(torch.uint8)
            self._last = (index, data)
        return data
