"""Weights of a folder, cut into several files where they are large, with the index that lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from blockmerge.checkpoints import TensorInfo
from blockmerge.merging.outputs.output import NamedTensor, Tensor, WeightFile

SHARD_BYTES = 10_000_000_000
"""The largest weight file in a folder, as diffusers itself cuts them ("10GB")."""


def sharded(
    tensors: Mapping[str, Tensor], stem: str, folder: str = ""
) -> tuple[list[WeightFile[Tensor]], dict[str, bytes]]:
    """Return the weight files for {name in the file: tensor}, and their index, {path: bytes}, where there are
    several. Their names begin with `stem`, after the path of the `folder`.
    """
    shards = _shards(tensors)
    if len(shards) == 1:
        return [WeightFile(f"{folder}{stem}.safetensors", shards[0])], {}
    names = [f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    held = dict(zip(names, shards, strict=True))
    files = [WeightFile(folder + name, shard) for name, shard in held.items()]
    return files, {f"{folder}{stem}.safetensors.index.json": _index(held)}


def _shards(tensors: Mapping[str, Tensor]) -> Sequence[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = _nbytes(tensor)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards


def _index(shards: Mapping[str, Mapping[str, NamedTensor]]) -> bytes:
    """What tells a loader which of several files a tensor is in."""
    index = {
        "metadata": {"total_size": sum(_nbytes(one) for shard in shards.values() for one in shard.values())},
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _nbytes(tensor: NamedTensor) -> int:
    return TensorInfo(tensor.dtype, tensor.shape, 0).nbytes
