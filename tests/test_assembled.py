"""Tensors in pieces, held against torch's own views."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockmerge.checkpoints import Assembled, Assembly, Piece, StateDict, TensorInfo, assembled

DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


def bytes_of(tensor):
    return tensor.numpy().tobytes()


def read_in_chunks(checkpoint, info, chunk, start=0):
    data = bytearray(info.nbytes - start)
    with checkpoint.reader() as reader:
        for offset in range(0, len(data), chunk):
            reader.read_into(info.offset + start + offset, memoryview(data)[offset : offset + chunk])
    return bytes(data)


@st.composite
def views(draw):
    """A flat tensor and a strided view of it: transposed, sliced, expanded, overlapping, empty, of no
    axes.
    """
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    strides = tuple(draw(st.integers(0, 40)) for _ in shape)
    skip = draw(st.integers(0, 5))
    dtype = draw(st.sampled_from(list(DTYPES)))
    reach = (
        1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        if 0 not in shape
        else 1
    )
    flat = torch.arange(skip + max(reach, 1), dtype=torch.int64).to(DTYPES[dtype])
    return dtype, flat, shape, strides, skip


@given(
    st.lists(views(), min_size=1, max_size=4),
    st.integers(1, 50),
    st.sampled_from([1, 24, 1000]),
    st.booleans(),
)
def test_pieces_are_torchs_views(cases, chunk, group, short):
    base = StateDict({str(number): flat for number, (_, flat, *_) in enumerate(cases)})
    tensors, expected = {}, {}
    for number, (dtype, flat, shape, strides, skip) in enumerate(cases):
        info = base.tensors[str(number)]
        tensors[f"whole {number}"], expected[f"whole {number}"] = info, flat
        piece = Piece(info.offset + skip * flat.element_size(), shape, strides)
        view = torch.as_strided(flat, shape, strides, skip)
        assert not piece.is_contiguous or view.is_contiguous()
        assert view.numel() < 2 or piece.is_contiguous == view.is_contiguous()
        tensors[f"view {number}"] = Assembly(dtype, shape, (piece,))
        expected[f"view {number}"] = view
        twice = (piece, Piece.contiguous(info.offset, flat.numel()), piece)
        tensors[f"joined {number}"] = Assembly(dtype, (2 * view.numel() + flat.numel(),), twice)
        expected[f"joined {number}"] = torch.cat([view.flatten(), flat, view.flatten()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembled, "_GROUP", group)
        patch.setattr(assembled, "_SHORT", 8 if short else 1 << 16)
        checkpoint = Assembled(base, tensors)
        for name, tensor in expected.items():
            info = checkpoint.tensors[name]
            assert info.shape == tuple(tensor.shape)
            assert checkpoint.read(name) == bytes_of(tensor)
            assert read_in_chunks(checkpoint, info, chunk) == bytes_of(tensor)
        # The last of the base and the first beyond it in one read, as a run of both is read.
        end = max(info.offset + info.nbytes for info in base.tensors.values())
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset + info.nbytes)
        everything = read_in_chunks(checkpoint, TensorInfo("U8", (last.offset + last.nbytes,), 0), 1 << 20)
        parts = [flat for _, flat, *_ in cases] + [
            tensor for name, tensor in expected.items() if not name.startswith("whole")
        ]
        assert everything == b"".join(map(bytes_of, parts))
        assert len(everything) >= end


def test_assemblies_nest():
    flat = torch.arange(24, dtype=torch.float32)
    base = StateDict({"x": flat})
    turned = Assembled(
        base, {"x": base.tensors["x"], "t": Assembly("F32", (6, 4), (Piece(0, (6, 4), (1, 6)),))}
    )
    at = turned.tensors["t"].offset
    again = Assembled(
        turned, {"t": turned.tensors["t"], "back": Assembly("F32", (4, 6), (Piece(at, (4, 6), (1, 4)),))}
    )
    assert again.read("back") == bytes_of(flat)
    assert again.read("t") == bytes_of(flat.view(4, 6).T)
    assert turned.tensors["x"] is base.tensors["x"]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((640, 320, 3, 3), (2880, 1, 960, 320)),
        ((1280, 1280), (1, 1280)),
        ((9000, 300), (1, 9000)),
        ((3000, 1000), (0, 1)),
    ],
)
def test_large_tensors_in_chunks(tmp_path, shape, strides):
    """Over several groups, and little memory; each chunk must not read the tensor again."""
    from safetensors.torch import save_file

    from blockmerge import open_checkpoint
    from blockmerge.checkpoints.formats.file import FileReader

    elements = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    flat = torch.randn(elements)
    save_file({"x": flat}, tmp_path / "x.safetensors")
    base = open_checkpoint(tmp_path / "x.safetensors")
    checkpoint = Assembled(
        base, {"y": Assembly("F32", shape, (Piece(base.tensors["x"].offset, shape, strides),))}
    )
    assert checkpoint.files == (tmp_path / "x.safetensors",)
    read = []
    real = FileReader.read_into
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FileReader,
            "read_into",
            lambda self, at, buffer: (read.append(len(buffer)), real(self, at, buffer)),
        )
        data = read_in_chunks(checkpoint, checkpoint.tensors["y"], 512 << 10)
    assert data == bytes_of(torch.as_strided(flat, shape, strides))
    assert sum(read) <= 4 * len(data)
    assert max(read) <= 4 << 20
