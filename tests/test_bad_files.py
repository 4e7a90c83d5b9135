"""Damaged inputs: each is refused in one line, before or while it is read, on every system."""

from __future__ import annotations

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockmerge import CheckpointError, open_checkpoint
from blockmerge.cli.main import run
from tests.effort import some
from tests.every_pair import every_pair
from tests.refusals import assert_refused
from tests.small_models import small_model

PROJ = "model.diffusion_model.input_blocks.4.1.proj_in.weight"


def pack(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F16", shape=(2,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD = {
    "empty": (b"", "is empty"),
    "three bytes": (b"\1\2\3", "only 3 bytes"),
    "text": (
        b"Dear user, this is no model. " * 40,
        ['is a text, not a model, and says "Dear user, this is no model.', "download the model itself"],
    ),
    "html": (b"<!DOCTYPE html><html>rate limited</html>", "is an HTML page, not a model"),
    "header beyond the file": (pack({}, length=1000), "header would be 1000 bytes"),
    "absurd header length": (pack({}, length=10**12), "does not begin with a safetensors header"),
    "longest header length": (pack({}, length=2**64 - 1), "does not begin with a safetensors header"),
    "header is no JSON": (pack(b"{nope"), "is not JSON"),
    "header is a list": (pack(b"[]"), "not a JSON object"),
    "header is empty": (pack(b""), "not a JSON object"),
    "header begins with a space": (pack(b" {}"), "not a JSON object"),
    "header is no UTF-8": (pack(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "header is UTF-16": (pack("{}".encode("utf-16")), "not a JSON object"),
    "half a surrogate pair": (
        pack(b'{"\\ud800": {"dtype":"F16","shape":[0],"data_offsets":[0,0]}}'),
        "surrogates",
    ),
    "nested too deeply": (pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "too deeply"),
    "NaN in the header": (pack(b'{"a": NaN}'), "NaN"),
    "a number of a million digits": (
        pack(b'{"a":{"dtype":"F16","shape":[1' + b"0" * 1_000_000 + b'],"data_offsets":[0,2]}}'),
        "its header holds a number of thousands of digits",
    ),
    "a name twice": (
        pack(
            b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}',
            b"\0\0",
        ),
        "twice: a",
    ),
    "a key twice": (
        pack(b'{"a":{"dtype":"F16","dtype":"F16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
        "twice: dtype",
    ),
    "entry is no object": (pack({"a": 3}), "without exactly dtype"),
    "entry lacks its shape": (
        pack({"a": {"dtype": "F16", "data_offsets": [0, 4]}}, b"\0" * 4),
        "without exactly dtype",
    ),
    "unknown dtype": (pack({"a": entry("F12")}, b"\0" * 4), 'unknown dtype "F12"'),
    "dtype is a number": (pack({"a": entry(7)}, b"\0" * 4), "unknown dtype 7"),
    "shape is negative": (
        pack({"a": entry(shape=(-2,))}, b"\0" * 4),
        "has the shape [-2]; shapes are lists of whole numbers from 0 up",
    ),
    "shape is a fraction": (pack({"a": entry(shape=(2.0,))}, b"\0" * 4), "shape [2.0]"),
    "shape is true": (pack({"a": entry(shape=(True,), offsets=(0, 2))}, b"\0" * 2), "shape [true]"),
    "shape overflows": (pack({"a": entry(shape=(2**62, 4))}, b"\0" * 4), "does not take"),
    "shape overflows to zero": (pack({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}), "does not take"),
    "size differs": (pack({"a": entry(shape=(3,))}, b"\0" * 4), "4 bytes of data"),
    "offsets backwards": (pack({"a": entry(offsets=(4, 0))}, b"\0" * 4), "data_offsets [4, 0]"),
    "three offsets": (pack({"a": entry(offsets=(0, 2, 4))}, b"\0" * 4), "data_offsets"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6), "overlaps"),
    "gap": (pack({"a": entry(), "b": entry(offsets=(6, 10))}, b"\0" * 10), "gap"),
    "gap at the start": (pack({"a": entry(offsets=(2, 6))}, b"\0" * 6), "gap"),
    "data cut short": (pack({"a": entry()}, b"\0" * 3), "cut short: 3 bytes of 4"),
    "data too long": (pack({"a": entry()}, b"\0" * 5), "goes on for 1 byte after"),
    "metadata is false": (pack({"__metadata__": False}), "__metadata__"),
    "metadata is a list": (pack({"__metadata__": []}), "__metadata__"),
    "metadata holds a number": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "long names and long values": (
        pack({"x" * 3000 + "y": entry(shape=[-1] * 30), "z" * 3000: entry(offsets=[9] * 50), "w": 1}),
        [
            "y has the shape [-1, ",
            "]; shapes are lists",
            "; tensor zz",
            "; these are two whole numbers",
            " and 1 more",
        ],
    ),
    "no tensors": (pack({}), "no diffusion model"),
    "no U-Net": (pack({"a": entry()}, b"\0" * 4), "no diffusion model"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_damaged_file_is_refused(pairs, tmp_path, capsys, case, side):
    data, says = BAD[case]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    good = pairs()[0]
    models = (bad, good) if side == "a" else (good, bad)
    says = [says] if isinstance(says, str) else says
    assert_refused(capsys, tmp_path, *models, "-w", "0.5", says=["bad.safetensors", *says])
    if "no diffusion model" not in says:
        with pytest.raises(CheckpointError):
            open_checkpoint(bad)
        assert_refused(capsys, tmp_path, "inspect", bad, says=["bad.safetensors", *says])


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """The paths of two small models that differ a little."""
    folder, (model, other) = (
        tmp_path_factory.mktemp("alike"),
        (small_model(seed=seed, for_a_folder=True) for seed in (0, 1)),
    )
    near = {
        name: tensor + other[name] / 20 if tensor.is_floating_point() else tensor
        for name, tensor in model.items()
    }
    for name, tensors in (("a", model), ("b", near)):
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_comparisons(alike, tmp_path, capsys, case):
    """As the model that is asked about it is an error; among many others it is a row, and the others go
    on.
    """
    data, says = BAD[case]
    says = [says] if isinstance(says, str) else list(says)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    a, b = alike
    refusals = ("similarity", bad, a), ("explain", bad, a, b), ("explain", a, bad)
    for words in some(refusals, of=3, chosen_by=case):
        assert_refused(capsys, tmp_path, *words, says=["bad.safetensors", *says])
    assert run(["similarity", str(a), str(bad), str(b), "--method", "weights", "--json"]) == 1
    out, err = capsys.readouterr()
    good, failed = json.loads(out)["references"]
    assert good["similarity"] > 0.9
    assert all(word in failed["error"] for word in says)
    assert err == "Error: 1 of the models could not be compared: bad.safetensors\n"


def test_an_absurd_header_length_costs_no_memory(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(pack({}, length=10**12))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_what_is_no_file_is_refused(pairs, tmp_path, capsys):
    import os

    good = pairs()[0]
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert_refused(
        capsys, tmp_path, good, "folder.safetensors", "-w", "0.5", says="folder.safetensors is a folder"
    )
    assert_refused(
        capsys, tmp_path, "missing.safetensors", good, "-w", "0.5", says="missing.safetensors: no such file"
    )
    assert_refused(capsys, tmp_path, good, "/dev/zero", "-w", "0.5", says="/dev/zero is not a regular file")
    assert_refused(capsys, tmp_path, good, "old.ckpt", "-w", "0.5", says="old.ckpt: no such file")
    assert_refused(capsys, tmp_path, good, "", "-w", "0.5", says="an empty path is not a model")
    assert_refused(capsys, tmp_path, good, "a\0b", "-w", "0.5", says="null")
    assert_refused(capsys, tmp_path, good, "two\nlines", "-w", "0.5", says=r"two\nlines")


def test_what_is_no_state_dict_is_refused(pairs):
    import blockmerge

    a = load_file(pairs()[0])
    for other, kind in ((None, "NoneType"), (str(pairs()[1]), "str")):
        with pytest.raises(
            CheckpointError,
            match=rf"a {kind} is not a state dict: give a dict of tensors \(merge\(\) takes files\)",
        ):
            blockmerge.merge_state_dicts(a, other, weights=0.5)
    with pytest.raises(
        CheckpointError, match=r"state dict B: .*proj_in.weight is a meta tensor, which has no values"
    ):
        blockmerge.merge_state_dicts(a, {**a, PROJ: a[PROJ].to("meta")}, weights=0.5)


def test_a_pipe_does_not_hang(pairs, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe.safetensors")


def test_an_unreadable_file_is_refused(pairs, tmp_path, monkeypatch):
    """The tests may run as root, who may read everything: the refusal is made by hand."""
    from pathlib import Path

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="permission denied"):
        open_checkpoint(pairs()[0])


@pytest.mark.parametrize("when", ["cut", "touched"])
def test_a_file_that_changes_while_it_is_read_is_refused(pairs, system, capsys, monkeypatch, when):
    import os

    from blockmerge.merging import execute

    a = system / "a.safetensors"
    a.write_bytes(pairs()[0].read_bytes())
    b = pairs()[1]
    real = execute.for_each

    def change_first(*arguments, **options):
        if when == "cut":
            os.truncate(a, 500_000)
        else:
            os.utime(a, ns=(1, 1))
        return real(*arguments, **options)

    monkeypatch.setattr(execute, "for_each", change_first)
    from blockmerge.cli.main import run

    assert run([str(a), str(b), "-w", "0.5", "-o", str(system / "out.safetensors")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert ("cut short" if when == "cut" else "changed") in err
    assert sorted(path.name for path in system.iterdir() if path.is_file()) == ["a.safetensors"]


def test_families_names_and_shapes_that_do_not_fit(pairs, tmp_path, capsys):
    a, b = pairs()
    whole = load_file(b)
    assert_refused(
        capsys,
        tmp_path,
        a,
        pairs("sdxl")[1],
        "-w",
        "0.5",
        says=["Stable Diffusion 1.x", "Stable Diffusion XL"],
    )
    assert_refused(capsys, tmp_path, a, pairs("sd2")[1], "-w", "0.5", says=["only models of one family"])

    lacking = {name: tensor for name, tensor in whole.items() if ".input_blocks.4." not in name}
    save_file(lacking, tmp_path / "lacking.safetensors")
    line = assert_refused(
        capsys,
        tmp_path,
        a,
        "lacking.safetensors",
        "-w",
        "0.5",
        says="lacking.safetensors lacks 38 U-Net tensors",
    )
    assert "and 35 more" in line
    assert_refused(
        capsys,
        tmp_path,
        "lacking.safetensors",
        a,
        "-w",
        "0.5",
        says="lacking.safetensors lacks 38 U-Net tensors",
    )

    one = {name: tensor for name, tensor in whole.items() if name != PROJ}
    save_file(one, tmp_path / "one.safetensors")
    assert_refused(
        capsys,
        tmp_path,
        a,
        "one.safetensors",
        "-w",
        "0.5",
        says=f"lacks 1 U-Net tensor of the other ({PROJ})",
    )
    three = (a, b, "one.safetensors", "-m", "add_difference", "-w", "0.5")
    assert_refused(
        capsys, tmp_path, *three, says=f"one.safetensors lacks 1 U-Net tensor of the others ({PROJ})"
    )

    for shape in ((1, 16, 1, 1), (16, 16), (16, 8, 1, 1)):
        save_file({**whole, PROJ: torch.zeros(shape, dtype=torch.float16)}, tmp_path / "shape.safetensors")
        for weight in ("0.5", "1"):
            assert_refused(
                capsys,
                tmp_path,
                a,
                "shape.safetensors",
                "-w",
                weight,
                says=["shapes differ", PROJ, str(list(shape))],
            )

    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_file({**whole, name: torch.zeros((1600, 24), dtype=torch.float16)}, tmp_path / "tokens.safetensors")
    assert_refused(capsys, tmp_path, a, "tokens.safetensors", "-w", "0.5", says=["shapes differ", name])


@pytest.mark.parametrize(
    ("value", "dtypes", "system"),
    every_pair(
        [float("nan"), float("inf"), float("-inf")],
        [("F16", "F16"), ("BF16", "BF16"), ("F32", "F32"), ("F16", "F32")],
        ["native", "bare", "tmpfs"],
    ),
    indirect=["system"],
)
def test_nan_and_infinity_are_refused_by_name(pairs, system, capsys, value, dtypes):
    a, b = pairs("sd1", dtypes)
    bad = load_file(b)
    for name in (PROJ, "model.diffusion_model.output_blocks.3.0.in_layers.0.bias"):
        bad[name].view(-1)[-1] = value
    save_file(bad, system / "bad.safetensors")
    line = assert_refused(
        capsys,
        system,
        a,
        "bad.safetensors",
        "-w",
        "0.5",
        says=["2 merged tensors", PROJ, "NaN or infinity in bad.safetensors"],
    )
    assert "output_blocks.3.0" in line
    # asked for, or not computed, it is none of the merge's business
    from blockmerge.cli.main import run

    assert (
        run(
            [
                str(a),
                str(system / "bad.safetensors"),
                "-w",
                "0.5",
                "--allow-nonfinite",
                "-q",
                "-o",
                str(system / "1.safetensors"),
            ]
        )
        == 0
    )
    assert (
        run([str(a), str(system / "bad.safetensors"), "-w", "0", "-q", "-o", str(system / "2.safetensors")])
        == 0
    )


@pytest.mark.parametrize(
    ("dtypes", "weights"), [(("F16", "F32"), "1"), (("F16", "BF16"), "1"), (("F16", "F32"), "0.5")]
)
def test_overflow_into_half_precision_is_refused_by_name(pairs, tmp_path, capsys, dtypes, weights):
    a, b = pairs("sd1", dtypes)
    large = load_file(b)
    large[PROJ].view(-1)[3] = 2e6
    save_file(large, tmp_path / "large.safetensors")
    assert_refused(
        capsys, tmp_path, a, "large.safetensors", "-w", weights, says=[PROJ, "values too large for F16"]
    )


def test_overflow_of_the_asked_dtype_is_refused_by_name(pairs, tmp_path, capsys):
    large = load_file(pairs("sd1", ("BF16", "BF16"))[0])
    large[PROJ].view(-1)[3] = 1e6
    save_file(large, tmp_path / "large.safetensors")
    for dtype, shown in (("fp16", "F16"), ("fp8_e4m3fn", "F8_E4M3"), ("fp8_e5m2", "F8_E5M2")):
        assert_refused(
            capsys, tmp_path, "large.safetensors", "large.safetensors", "-w", "0", "--dtype", dtype,
            says=[PROJ, f"values too large for {shown}"],
        )  # fmt: skip


def test_many_faults_are_one_short_line(pairs, tmp_path, capsys):
    a, b = pairs()
    bad = {
        name: tensor * float("nan") if tensor.is_floating_point() else tensor
        for name, tensor in load_file(b).items()
    }
    save_file(bad, tmp_path / "bad.safetensors")
    line = assert_refused(
        capsys, tmp_path, a, "bad.safetensors", "-w", "0.5", says="merged tensors would hold NaN"
    )
    assert len(line) < 1000
    assert "more" in line
    assert line.count("each: NaN or infinity in bad.safetensors") == line.count("NaN or infinity in") == 1


def test_faults_of_several_reasons_are_told_one_by_one(pairs, tmp_path, capsys):
    a, b = map(load_file, pairs())
    for model, fault in ((a, "a"), (b, "b")):
        model[f"model.diffusion_model.{'out' if fault == 'a' else 'input_blocks.0'}.0.bias"][0] = float("nan")
        save_file(model, tmp_path / f"{fault}.safetensors")
    first, second = "model.diffusion_model.input_blocks.0.0.bias", "model.diffusion_model.out.0.bias"
    says = [f"{first} (NaN or infinity in b.safetensors)", f"{second} (NaN or infinity in a.safetensors)"]
    assert_refused(capsys, tmp_path, "a.safetensors", "b.safetensors", "-w", "0.5", says=says)


def test_hostile_names_are_shown_harmlessly(pairs, tmp_path, capsys):
    name = "model.diffusion_model.\x1b[31mred\n\u202e" + "x" * 5000
    save_file({**load_file(pairs()[0]), name: torch.zeros(1)}, tmp_path / "bad.safetensors")
    line = assert_refused(
        capsys, tmp_path, pairs()[0], "bad.safetensors", "-w", "0.5", says=r"\x1b[31mred\n\u202e"
    )
    assert "\x1b" not in line
    assert len(line) < 1000


@pytest.mark.parametrize("what", ["entries", "axes", "duplicates"])
def test_large_hostile_headers_cost_little(tmp_path, what):
    import time

    body = {
        "entries": b"{" + b",".join(b'"%d":{}' % n for n in range(300_000)) + b"}",
        "axes": b'{"a":{"dtype":"F16","shape":[' + b"0," * 2_000_000 + b'0],"data_offsets":[0,0]}}',
        "duplicates": b"{" + b",".join([b'"a":1'] * 300_000) + b"}",
    }[what]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(pack(body))
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.process_time() - started < 10  # it took minutes, once; far from a benchmark
    assert len(str(caught.value)) < 1000


def test_a_metadata_value_that_cannot_be_written_again(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(pack(b'{"__metadata__":{"x":"\\ud800"}}'))
    with pytest.raises(CheckpointError, match="surrogates"):
        open_checkpoint(path)


def test_metadata_that_is_null_is_none(pairs, tmp_path):
    """The reference reader takes it, so must we."""
    from safetensors import safe_open

    path = tmp_path / "null.safetensors"
    path.write_bytes(pack({"__metadata__": None, "a": entry()}, b"\0" * 4))
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["a"]
    assert open_checkpoint(path).metadata == {}
    assert open_checkpoint(path).tensors.keys() == {"a"}


def test_a_file_name_that_is_no_utf8(pairs, tmp_path):
    import os

    name = os.fsencode(tmp_path) + b"/a\xff.safetensors"
    try:
        with open(name, "wb") as file:
            file.write(pairs()[0].read_bytes())
    except OSError:
        pytest.skip("not on this file system")
    import blockmerge

    blockmerge.merge(os.fsdecode(name), pairs()[1], weights=0.5, output=tmp_path / "out.safetensors")
    assert len(load_file(tmp_path / "out.safetensors")) == 1131
