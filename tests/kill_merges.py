"""Kills merges at random moments and looks at what is left. Run by test_kill.py; prints what it saw as JSON.

A process that has torch loaded forks a child for every merge, so that the kill falls into the merge and not
into the loading of torch. The parent never computes with torch, whose threads would not survive the fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch  # noqa: F401 (loaded for the children)

import blockmerge
import blockmerge.merging.kernel
from blockmerge.checkpoints.writing import disk


def child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def main(a, b, folder, rounds):
    output = Path(folder) / "out.safetensors"
    notes = Path(folder) / "notes.json"

    def merge(weight, overwrite):
        result = blockmerge.merge(a, b, weights=weight, output=output, overwrite=overwrite)
        notes.write_text(json.dumps(result.notes))

    assert os.waitpid(child(lambda: merge(0.5, True)), 0)[1] == 0
    new = digest(output)
    started = time.perf_counter()
    assert os.waitpid(child(lambda: merge(0.25, True)), 0)[1] == 0
    whole = time.perf_counter() - started
    old = digest(output)
    assert new != old
    random.seed(0)
    seen = {"rounds": 0, "midway": 0, "finished": 0, "swept": 0, "seconds": whole}
    # On a machine that is now fast and now slow, many kills come too late: go on until enough have come
    # midway.
    while seen["rounds"] < rounds or (seen["midway"] < rounds // 3 and seen["rounds"] < 5 * rounds):
        seen["rounds"] += 1
        with_old = seen["rounds"] % 2 == 0
        if with_old:
            assert os.waitpid(child(lambda: merge(0.25, True)), 0)[1] == 0
            assert digest(output) == old
        else:
            output.unlink(missing_ok=True)
        pid = child(lambda: merge(0.5, True))
        time.sleep(random.random() * whole)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = sorted(path.name for path in Path(folder).glob(".blockmerge-*"))
        found = digest(output) if output.exists() else None
        assert found in ({old, new} if with_old else {None, new}), (found, old, new)
        seen["finished"] += found == new
        if left:
            seen["midway"] += 1
            assert os.waitpid(child(lambda: merge(0.25, True)), 0)[1] == 0
            assert not list(Path(folder).glob(".blockmerge-*"))
            assert f"removed {left[0]}" in notes.read_text()
            assert digest(output) == old
            seen["swept"] += 1
    print(json.dumps(seen))


if __name__ == "__main__":
    if sys.argv[5:] == ["bare"]:  # without what Windows lacks; the children inherit it
        for name in ("O_DIRECT", "O_DIRECTORY", "pread", "pwrite", "posix_fallocate", "sched_getaffinity"):
            delattr(os, name)
        disk.reserve = lambda *_: None
    main(*sys.argv[1:4], int(sys.argv[4]))
