"""Checkpoints to try things on: real names, real or thin shapes, values of real magnitude.

A is random; B is A plus small differences, as a fine-tune is. Thin models have the complete layout of a real
one with narrower widths (8 channels for 320), on which diffusers' U-Net still runs. Tests and benchmarks use
the same generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES, Family, component_of, is_position_ids
from blockmerge.checkpoints import AtomicFile, TensorInfo, check_output, encode_header
from blockmerge.dtypes import itemsize
from blockmerge.errors import OutputError, RecipeError, reason, shown

if TYPE_CHECKING:
    import torch

_THIN_WIDTHS = {
    "unet": {
        320: 8,
        384: 12,
        1152: 36,
        1536: 48,
        2304: 72,
        3072: 96,
        6144: 192,
        12288: 384,
        640: 16,
        960: 24,
        1280: 32,
        1920: 48,
        2560: 64,
        5120: 128,
        10240: 256,
        768: 24,
        1024: 32,
        2048: 64,
        2816: 88,
    },
    "vae": {128: 8, 256: 16, 512: 32},
    "text": {768: 24, 1024: 32, 1280: 40, 3072: 96, 3840: 120, 4096: 128, 5120: 160, 49408: 1544},
}
_STEP = 1 << 22  # elements made at once


def demo_layout(family: Family | str, *, full_size: bool = False) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a complete model of one of FAMILIES, thin or at full size."""
    if isinstance(family, str) and family not in FAMILIES:
        raise RecipeError(f"unknown family '{shown(family)}': {', '.join(FAMILIES)}")
    known = FAMILIES[family] if isinstance(family, str) else family
    if full_size:
        return dict(known.layout)
    return {name: _thin(name, shape, known) for name, shape in known.layout.items()}


def _thin(name: str, shape: tuple[int, ...], family: Family) -> tuple[int, ...]:
    widths = _THIN_WIDTHS.get(component_of(name), _THIN_WIDTHS["text"])
    if family.thin:
        own = (
            one for pattern, one in family.thin["names"].items() if fnmatchcase(family.short(name), pattern)
        )
        widths = {int(extent): to for extent, to in (family.thin["widths"] | next(own, {})).items()}
    return tuple(widths.get(extent, extent) for extent in shape)


def write_pair(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    family: Family | str = DEFAULT_FAMILY,
    *,
    full_size: bool = False,
    dtypes: tuple[str, str] = ("F16", "F16"),
    difference: float = 0.05,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model A and a model B that is A plus differences of `difference` times its weights' size.

    `dtypes` are A's and B's, in safetensors' spelling. The same arguments give the same files. Memory stays
    small. `progress(done, total)` is told the numbers made of those to make. Raises OutputError when a file
    exists or cannot be written.
    """
    if not 0 <= seed < 1 << 63:
        raise RecipeError(f"{shown(seed)} is not a seed: a whole number from 0 to 2^63 - 1")
    shapes = demo_layout(family, full_size=full_size)
    order = _file_order(shapes)
    with ExitStack() as stack:
        files = []
        for path, dtype in zip((a, b), dtypes, strict=True):
            tensors = _infos(order, shapes, dtype)
            header = encode_header(tensors, metadata or {"format": "pt"}, 8)
            last = tensors[order[-1]]
            target = check_output(path, overwrite=overwrite)
            file = stack.enter_context(
                AtomicFile(target, len(header) + last.offset + last.nbytes, overwrite=overwrite)
            )
            try:
                handle = stack.enter_context(file.path.open("r+b"))
                handle.write(header)
            except OSError as error:
                raise OutputError(f"cannot write {shown(path)}: {reason(error)}") from error
            files.append((file, handle, dtype))
        done, total = 0, sum(TensorInfo("F32", shape, 0).elements for shape in shapes.values())
        for pair in _values(order, shapes, difference, seed):
            done += len(pair[0])
            if progress:
                progress(done, total)
            for (file, handle, dtype), values in zip(files, pair, strict=True):
                try:
                    handle.write(_bytes(values, dtype))
                except OSError as error:
                    raise OutputError(f"cannot write {shown(file.target)}: {reason(error)}") from error
        for file, handle, _ in files:
            try:
                handle.close()
            except OSError as error:  # what it still held did not fit
                raise OutputError(f"cannot write {shown(file.target)}: {reason(error)}") from error
            file.commit()


def make_state_dicts(
    family: Family | str = DEFAULT_FAMILY, *, difference: float = 0.05, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the thin models that `write_pair` writes, in float32, as state dicts."""
    import torch

    shapes = demo_layout(family)
    order = _file_order(shapes)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for pair in _values(order, shapes, difference, seed):
        for values, found in zip(pair, parts, strict=True):
            found.append(values)
    dicts = []
    for found in parts:
        flat = iter(found)
        state_dict = {}
        for name in order:
            shape = shapes[name]
            elements = TensorInfo("F32", shape, 0).elements
            pieces = [next(flat) for _ in range(max(1, -(-elements // _STEP)))]
            state_dict[name] = torch.cat(pieces).view(shape)
        dicts.append(state_dict)
    return dicts[0], dicts[1]


def _file_order(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    # The order of the reference writer: widest dtype first, then by name.
    return sorted(shapes, key=lambda name: (not is_position_ids(name), name))


def _infos(order: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, TensorInfo]:
    tensors, offset = {}, 0
    for name in order:
        own = "I64" if is_position_ids(name) else dtype
        info = TensorInfo(own, shapes[name], offset)
        assert itemsize(own)
        tensors[name] = info
        offset += info.nbytes
    return tensors


def _values(
    order: Sequence[str], shapes: Mapping[str, tuple[int, ...]], difference: float, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield A's and B's values, flat, tensor after tensor, long ones in several steps."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name in order:
        shape = shapes[name]
        elements = TensorInfo("F32", shape, 0).elements
        if is_position_ids(name):
            positions = torch.arange(elements)
            yield positions, positions
            continue
        middle, spread = _magnitude(name, shape)
        for start in range(0, elements, _STEP):
            count = min(_STEP, elements - start)
            a = torch.randn(count, generator=generator).mul_(spread).add_(middle)
            b = torch.randn(count, generator=generator).mul_(spread * difference).add_(a)
            yield a, b


def _magnitude(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation as trained weights have them, roughly."""
    if name.endswith("logit_scale"):
        return 4.6, 0.0
    if len(shape) == 1:
        return (1.0, 0.1) if name.endswith("weight") else (0.0, 0.02)
    fan_in = TensorInfo("F32", tuple(shape[1:]), 0).elements
    return 0.0, fan_in**-0.5


def _bytes(values: torch.Tensor, dtype: str) -> memoryview:
    import torch

    if values.dtype == torch.int64:
        return values.numpy().view("u1").data
    wanted = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[dtype]
    return values.to(wanted).view(torch.uint8).numpy().data
