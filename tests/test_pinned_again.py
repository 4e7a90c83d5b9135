"""Every merge of the pinned table, made again from its own recipe in three ways: the same file, bit for bit."""

from __future__ import annotations

import filecmp
import os
import shutil

import pytest

import blockmerge
from blockmerge import Recipe
from blockmerge.merging import Recorded
from blockmerge.rendering.recipes import recipe_text
from tests.effort import some
from tests.pinned.cases import CASES, GROUPS
from tests.pinned.inputs import Inputs, Source


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("pinned") / "inputs")


def made(case, inputs, home):
    """What a case writes, and the paths that it names."""
    options = {
        name: inputs.given(value) if isinstance(value, Source) else value
        for name, value in case.options.items()
    }
    output = home / {"file": "out.safetensors", "folder": "out"}[options.pop("output")]
    sources = list(map(inputs.given, case.sources))
    named = [
        *sources,
        *(options[key] for key in ("vae", "configs") if isinstance(case.options.get(key), Source)),
    ]
    if case.call == "convert":
        blockmerge.convert(*sources, output, threads=1, **options)
    else:
        blockmerge.merge(*sources, output=output, threads=1, **options)
    return output, named


def is_same(one, other):
    """Whether two outputs are the same files with the same bytes."""
    if one.is_file():
        return filecmp.cmp(one, other, shallow=False)
    names = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    there = [path.relative_to(other) for path in sorted(other.rglob("*")) if path.is_file()]
    return names == there and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


@pytest.mark.parametrize("group", GROUPS)
def test_every_pinned_merge_is_made_again_verified_and_run(inputs, tmp_path, group):
    cases = [case for case in CASES if case.group == group and case.call in ("merge", "convert")]
    wrong = []
    for case in some(cases, of=24):
        home = tmp_path / "case"
        home.mkdir()
        try:
            wrong += [f"{case.id}: {fault}" for fault in faults(case, inputs, home)]
        finally:
            shutil.rmtree(home)
    assert not wrong, "\n" + "\n".join(wrong)


def faults(case, inputs, home):
    try:
        output, named = made(case, inputs, home)
    except blockmerge.BlockmergeError:
        return  # it is pinned that it is refused
    paths = [path for path in named if isinstance(path, (str, os.PathLike))]
    if len(paths) < len(named) or "configs" in case.options:
        return  # in memory, or configs that are not recorded: said so, as test_recipe_files.py holds
    folders = sorted({os.path.dirname(path) for path in paths})
    try:
        again = home / "again" / output.name
        again.parent.mkdir()
        blockmerge.again(output, models=folders, output=again, threads=1)
        if not is_same(output, again):
            yield "made again, it is another file"
        found = blockmerge.verify(output, models=folders, threads=1)
        if not found.same:
            yield f"not verified: {found.said}"
        if len({os.path.basename(path) for path in paths}) < len(set(map(os.path.realpath, paths))):
            return  # two of one name cannot both stand beside the recipe
        for path in paths:
            place = home / "run" / os.path.basename(path)
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                place.symlink_to(path)
        (home / "run" / "shown.toml").write_text(recipe_text(Recorded.of(output)))
        target = home / "run" / f"shown-{output.name}"
        Recipe.load(home / "run" / "shown.toml").run(target, threads=1)
        if not is_same(output, target):
            yield "run by the recipe that is shown, it is another file"
    except blockmerge.BlockmergeError as error:
        yield f"{type(error).__name__}: {error}"
