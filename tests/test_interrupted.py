"""Ctrl-C at every place where it can come while a writer begins: by chance, it comes there once in thousands
of times.
"""

from __future__ import annotations

import dis
import sys
from itertools import pairwise

import pytest

from blockmerge.checkpoints import AtomicFile, AtomicFolder
from blockmerge.checkpoints.writing import disk

INSIDE = (
    AtomicFile.__enter__,
    AtomicFolder.__enter__,
    AtomicFolder._create,
    disk.create_locked,
)
PLACES = {
    one.__code__: {
        after.offset
        for at, after in pairwise(dis.get_instructions(one))
        if at.opname.startswith(("CALL", "RESUME"))
    }
    for one in INSIDE
}
"""The instructions before which Python looks for signals, by their functions' code."""

WRITERS = {
    "file": lambda folder: AtomicFile(folder / "out", 5000),
    "folder": lambda folder: AtomicFolder(folder / "out", {"unet/x": 5000, "model_index.json": b"{}"}),
}


def interrupt_at(number):
    """A trace function that interrupts at that one of the places."""
    left = number

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code not in PLACES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in PLACES[frame.f_code]:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", WRITERS)
def test_whenever_a_writer_is_interrupted_nothing_is_left(tmp_path, kind):
    before = sys.gettrace()
    number, is_through = 0, False
    while not is_through:
        sys.settrace(interrupt_at(number))
        try:
            with WRITERS[kind](tmp_path):
                is_through = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert list(tmp_path.iterdir()) == [], number
        number += 1
    assert number > 10
