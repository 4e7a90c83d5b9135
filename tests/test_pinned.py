"""What merges and conversions write is what they have written before, in every form, hash by hash."""

from __future__ import annotations

import json

import pytest

from tests.effort import some
from tests.pinned.cases import CASES, GROUPS
from tests.pinned.inputs import Inputs
from tests.pinned.running import TABLE, changes, machine, run

PINNED = json.loads(TABLE.read_text())
SAME_MACHINE = PINNED["machine"] == machine()  # elsewhere, the last bits may be rounded otherwise


def values(case):
    """What of a case is to be in some other, if not in it."""
    yield case.call, case.options.get("method")
    for source in case.sources:
        yield from (source.family, source.form, source.dtype, *source.extras)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("pinned") / "inputs")


@pytest.mark.parametrize("group", GROUPS)
def test_outputs_are_those_that_were_pinned(inputs, tmp_path, group):
    differing = []
    for case in some((case for case in CASES if case.group == group), of=6, values=values):
        found = run(case, inputs, tmp_path / "case")
        differences = changes(found, PINNED["outputs"].get(case.id, {}), same_machine=SAME_MACHINE)
        differing += [f"{case.id}: {difference}" for difference in differences]
    assert not differing, "\n" + "\n".join(differing)


def test_the_table_holds_these_cases():
    assert list(PINNED["outputs"]) == [case.id for case in CASES]
