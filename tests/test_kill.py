"""`kill -9` at random moments: no file or a complete one under the final name, and the next merge cleans
up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.effort import many


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("rounds", "kind"), [(many(18), "native"), (many(12), "bare")])
def test_killed_merges_leave_no_bad_file(big_pair, tmp_path, rounds, kind):
    script = Path(__file__).parent / "kill_merges.py"
    arguments = [sys.executable, str(script), *map(str, big_pair), str(tmp_path), str(rounds), kind]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["rounds"] >= rounds
    assert seen["midway"] >= rounds // 3, seen
    assert seen["swept"] == seen["midway"]
