"""Write the table of pinned outputs anew: see the package's docstring for when."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.pinned.cases import CASES
from tests.pinned.inputs import Inputs
from tests.pinned.running import TABLE, machine, run


def main(threads: int = 2, path: Path = TABLE) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # No table depends on the presets of whoever writes it.
        for name in (
            "XDG_CONFIG_HOME",
            "APPDATA",
            "HOME",
        ):
            os.environ[name] = folder
        inputs = Inputs(Path(folder, "inputs"))
        found = {case.id: run(case, inputs, Path(folder, "case"), threads) for case in CASES}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in found.items())
    path.write_text(f'{{\n"machine": {json.dumps(machine())},\n"outputs": {{\n{lines}\n}}\n}}\n')
    seconds, size = time.perf_counter() - started, path.stat().st_size
    print(f"{len(found)} cases in {seconds:.1f} s: {path}, {size / 1000:.0f} kB")
    refused = [f"{name}: {record['error']}" for name, record in found.items() if "error" in record]
    print(*refused, sep="\n")


if __name__ == "__main__":
    # To see that nothing hangs on the threads: python -m tests.pinned 4 another.json
    main(*(kind(word) for kind, word in zip((int, Path), sys.argv[1:], strict=False)))
