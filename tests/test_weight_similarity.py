"""Weight similarity against float64 sums made by numpy, and what is defined for zeros, NaN and missing
parts.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import block_of, component_of
from tests.refusals import assert_refused

CONV = "model.diffusion_model.input_blocks.4.1.proj_in.weight"


def groups_of(a, b, family):
    """{group: [(a, b) as float64 arrays]} of every block, component and in total."""
    found = {}
    for name, tensor in a.items():
        if not tensor.is_floating_point() or name not in b:
            continue
        pair = (tensor.double().numpy().ravel(), b[name].double().numpy().ravel())
        for group in (block_of(name, family), component_of(name), "total"):
            found.setdefault(group, []).append(pair)
    return {
        group: [np.concatenate(side) for side in zip(*pairs, strict=True)] for group, pairs in found.items()
    }


def assert_matches(found, expected):
    everything = {"total": found.total, **found.blocks, **found.components}
    assert everything.keys() == expected.keys()
    for group, (a, b) in expected.items():
        one = everything[group]
        assert one.cosine == pytest.approx(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b), abs=1e-6), group
        assert one.relative_difference == pytest.approx(
            np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5
        ), group
        assert one.max_difference == pytest.approx(np.abs(b - a).max(), rel=1e-6), group
    assert found.similarity == found.total.cosine
    assert found.parts == {block: one.cosine for block, one in found.blocks.items()}


@pytest.mark.parametrize(
    ("family", "dtypes"),
    [
        ("sd1", ("F16", "F16")),
        ("sd1", ("BF16", "F32")),
        ("sd1", ("F64", "F16")),
        ("sd2", ("BF16", "F32")),
        ("sdxl", ("F16", "F16")),
    ],
)
def test_it_equals_float64(pairs, family, dtypes):
    paths = pairs(family, dtypes)
    (found,) = blockmerge.similarity(paths[0], [paths[1]], method="weights").references
    assert_matches(found, groups_of(*map(load_file, paths), family))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_order_change_no_digit(pairs, threads):
    a, b = pairs()
    c = pairs(difference=0.01)[1].rename(pairs(difference=0.01)[1].with_name("c.safetensors"))
    try:
        usual = blockmerge.similarity(a, [b, c], method="weights").references
        assert blockmerge.similarity(a, [c, b], method="weights", threads=threads).references == usual
        assert [found.name for found in usual] == ["c.safetensors", "b.safetensors"]
    finally:
        c.rename(c.with_name("b.safetensors"))


def test_the_cosine_of_differences(pairs, tmp_path):
    """Two merges of the same difference point the same way from their base; the plain cosine hardly tells."""
    a, b = pairs()
    base, other = load_file(a), load_file(b)
    for share in (0.25, 0.5):
        mixed = {
            n: torch.lerp(t.float(), other[n].float(), share).half() if t.is_floating_point() else t
            for n, t in base.items()
        }
        save_file(mixed, tmp_path / f"{share}.safetensors")
    report = blockmerge.similarity(
        tmp_path / "0.25.safetensors", [tmp_path / "0.5.safetensors", b, a], "weights", common_base=a
    )
    by_name = {found.name: found for found in report.references}
    assert report.common_base == "a.safetensors"
    assert by_name["0.5.safetensors"].total.difference_cosine > 0.999
    # It is the base: there is no difference to take.
    assert by_name["a.safetensors"].total.difference_cosine is None
    expected = groups_of(*(load_file(tmp_path / f"{share}.safetensors") for share in (0.25, 0.5)), "sd1")
    bases = groups_of(base, base, "sd1")
    for group, (x, y) in expected.items():
        dx, dy = x - bases[group][0], y - bases[group][0]
        cosine = dx @ dy / np.linalg.norm(dx) / np.linalg.norm(dy)
        found = by_name["0.5.safetensors"]
        one = {"total": found.total, **found.blocks, **found.components}[group]
        assert one.difference_cosine == pytest.approx(cosine, abs=1e-6), group


def test_thirty_million_halves_are_exactly_themselves(pairs):
    """More than 2^24, where a sum of ones in float32 stops."""
    tensors = load_file(pairs()[0])
    tensors["extra.weight"] = torch.randn(3 * 10**7, generator=torch.Generator().manual_seed(1)).half()
    copy = {name: tensor.clone() for name, tensor in tensors.items()}
    (found,) = blockmerge.similarity(tensors, [copy], method="weights").references
    assert found.components["other"].cosine == pytest.approx(1, abs=1e-9)
    assert found.components["other"].relative_difference == 0
    copy["extra.weight"] = (copy["extra.weight"].float() * 1.1).half()
    (found,) = blockmerge.similarity(tensors, [copy], method="weights").references
    a, b = tensors["extra.weight"].double(), copy["extra.weight"].double()
    assert found.components["other"].relative_difference == pytest.approx(
        ((b - a).norm() / a.norm()).item(), rel=1e-5
    )


def test_zeros(pairs):
    tensors = load_file(pairs()[0])
    blank = {n: torch.zeros_like(t) if "input_blocks.4." in n else t for n, t in tensors.items()}
    (found,) = blockmerge.similarity(blank, [blank], method="weights").references
    assert (found.blocks["IN04"].cosine, found.blocks["IN04"].relative_difference) == (1, 0)
    (found,) = blockmerge.similarity(blank, [tensors], method="weights").references
    assert (found.blocks["IN04"].cosine, found.blocks["IN04"].relative_difference) == (0, None)
    (found,) = blockmerge.similarity(tensors, [blank], method="weights").references
    assert (found.blocks["IN04"].cosine, found.blocks["IN04"].relative_difference) == (0, 1)


def test_nan_is_told_by_name(pairs, tmp_path, capsys):
    a, b = pairs()
    tensors = load_file(b)
    tensors[CONV].view(-1)[7] = torch.nan
    bad = tmp_path / "nan.safetensors"
    save_file(tensors, bad)
    good, failed = blockmerge.similarity(a, [bad, b], method="weights").references
    assert good.error is None
    assert failed.error.startswith("nan.safetensors holds NaN or infinity")
    assert failed.error.endswith(f" in {CONV}")
    assert_refused(
        capsys,
        tmp_path,
        "similarity",
        bad,
        b,
        "--method",
        "weights",
        says=["nan.safetensors holds NaN", CONV],
    )
    matrix = blockmerge.similarity_matrix([a, bad, b], method="weights")
    assert matrix.errors == {"nan.safetensors": failed.error}
    assert matrix.similarity[1] == (None, None, None)
    assert matrix.similarity[0][2] == good.similarity


def test_missing_parts_and_other_shapes(pairs):
    a, b = (load_file(path) for path in pairs())
    unet = {name: tensor for name, tensor in b.items() if name.startswith("model.diffusion_model.")}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    # As inpainting models have it.
    unet[first] = torch.cat([unet[first], unet[first][:, :1].repeat(1, 5, 1, 1)], dim=1)
    (found,) = blockmerge.similarity(a, [unet], method="weights").references
    assert "BASE" not in found.blocks
    assert set(found.components) == {"unet"}
    assert any("lacks text_encoder, vae" in note for note in found.notes)
    assert any(first in note for note in found.notes)
    assert_matches(found, groups_of(a, {n: t for n, t in unet.items() if n != first}, "sd1"))


def test_integers_and_schedules_do_not_count(pairs):
    a, b = (load_file(path) for path in pairs())
    (plain,) = blockmerge.similarity(a, [b], method="weights").references
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    b[positions] = b[positions] + 1
    a["betas"], b["betas"] = torch.ones(1000), torch.zeros(1000)
    (found,) = blockmerge.similarity(a, [b], method="weights").references
    assert found.total == plain.total


def test_huge_values_do_not_overflow(pairs):
    a = {n: t.float() for n, t in load_file(pairs()[0]).items()}
    a[CONV] = torch.full_like(a[CONV], 1e30)
    (found,) = blockmerge.similarity(a, [dict(a)], method="weights").references
    assert (found.blocks["IN04"].cosine, found.error) == (1, None)


def test_nan_in_the_common_base(pairs, tmp_path, capsys):
    a, b = pairs()
    tensors = load_file(b)
    tensors[CONV].view(-1)[7] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    arguments = ["similarity", a, b, "--method", "weights", "--common-base", tmp_path / "nan.safetensors"]
    assert_refused(capsys, tmp_path, *arguments, says=["nan.safetensors holds NaN", CONV])


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e-25, torch.float32), (3e38, torch.float32), (1e25, torch.bfloat16)]
)
def test_tiny_and_large_values_are_no_zeros_and_no_nan(pairs, value, dtype):
    a = {n: t.to(dtype) for n, t in load_file(pairs()[0]).items()}
    b = dict(a)
    a[CONV], b[CONV] = torch.full_like(a[CONV], value), torch.full_like(a[CONV], -value)
    only = {n: {CONV: t[CONV]} for n, t in (("a", a), ("b", b))}
    (found,) = blockmerge.similarity(a, [b], method="weights").references
    assert found.error is None
    if value > 1:
        assert found.blocks["IN04"].cosine == pytest.approx(-1, abs=1e-6)
    assert found.blocks["IN04"].max_difference == pytest.approx(2 * only["a"][CONV].double().max().item())


def test_many_files_take_few_handles(pairs, tmp_path):
    resource = pytest.importorskip("resource")
    a, b = pairs()
    for number in range(36):
        (tmp_path / f"{number:02}.safetensors").symlink_to(a if number % 2 else b)
    files = []
    for path in sorted(tmp_path.iterdir()):  # of their own, not links to the same: those count once
        target = path.resolve()
        path.unlink()
        path.hardlink_to(target) if target.stat().st_dev == tmp_path.stat().st_dev else path.write_bytes(
            target.read_bytes()
        )
        files.append(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 64
    # 36 files held open by 3 threads would take 108.
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 75, hard))
    try:
        matrix = blockmerge.similarity_matrix(files, method="weights", threads=3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not matrix.errors
    assert matrix.similarity[0][2] == pytest.approx(1, abs=1e-9)


def test_the_matrix_is_the_same_numbers(pairs, monkeypatch):
    models = [*pairs(), *pairs(seed=1)]
    matrix = blockmerge.similarity_matrix(models, method="weights")
    for i, base in enumerate(models):
        for j, other in enumerate(models):
            expected = blockmerge.similarity(base, [other], method="weights").references[0].similarity
            assert matrix.similarity[i][j] == pytest.approx(expected, abs=1e-9)
    from blockmerge.comparing import sums

    monkeypatch.setattr(sums, "MOST_ROWS", 2)
    again = blockmerge.similarity_matrix(models, method="weights")
    assert np.allclose(again.similarity, matrix.similarity, atol=1e-9, rtol=0)


def test_a_file_cut_short_meanwhile_is_a_row(pairs, tmp_path):
    a, b = pairs()
    tail = tmp_path / "tail.safetensors"
    tail.write_bytes(b.read_bytes())
    opened = blockmerge.open_checkpoint(tail)
    tail.write_bytes(b.read_bytes()[:-1000])
    good, failed = blockmerge.similarity(a, [opened, b], method="weights").references
    assert "cut short" in failed.error
    assert good.similarity == blockmerge.similarity(a, [b], method="weights").references[0].similarity


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.safetensors"], "nothing to compare"),
        (["a.safetensors", "b.safetensors", "--method", "atention"], "did you mean 'attention'"),
        (["a.safetensors", "b.safetensors", "--common-base", "a.safetensors"], "for the method weights"),
        (["a.safetensors", "b.safetensors", "--format", "jsn"], "did you mean 'json'"),
        (["a.safetensors", "b.safetensors", "--matrix", "--blocks"], "leave out"),
        (["a.safetensors", "b.safetensors", "-o", "a.safetensors"], "ending of a model"),
        (["a.safetensors", "b.safetensors", "-o", "nowhere/r.html"], "does not exist"),
        (["nope.safetensors", "b.safetensors"], "nope.safetensors"),
        (
            ["a.safetensors", "b.safetensors", "--matrix", "--common-base", "a.safetensors"],
            "leave out --blocks and --common-base",
        ),
        (
            ["a.safetensors", "b.safetensors", "--method", "weights", "--common-base", "nope.safetensors"],
            "nope.safetensors",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(pairs, tmp_path, capsys, arguments, says):
    for path in pairs():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert_refused(capsys, tmp_path, "similarity", *arguments, says=says)
