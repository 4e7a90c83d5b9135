"""How long a merge takes and how much memory, beside a copy and beside load-everything-and-save.

    python benchmarks/merge.py [--family sd1] [--rounds 5] [--folder DIR] [--peers] [--buffered]

Makes a full-size pair with the project's own generator (kept in --folder, when one is given), then runs paired rounds of

  cp            cp --reflink=never of A, and fsync of the copy
  write only    dd of as many bytes, direct and fsync: what the disk allows, whatever the program
  load and save a whole process: safetensors' load_file of both, one loop over the tensors, save_file, fsync
  merge …       blockmerge.merge in this process, torch loaded; fsync included
  command …     the whole command `blockmerge A B`, a fresh process
  peers         sd-mecha and sd-meh, whole processes, where they are installed

Every round runs each of them once, in a random order, and ratios are taken within a round: these are what to compare,
since seconds depend on the machine and on what else it is doing. Files are warm (read once before). Memory is the peak
of anonymous memory (RssAnon and RssShmem, Linux), sampled every 5 ms in a process of its own, beside the same of `import torch`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LOAD_AND_SAVE = """
import os, sys
from safetensors.torch import load_file, save_file
a, b, out = sys.argv[1:]
A, B = load_file(a), load_file(b)
for name in A:
    if A[name].is_floating_point():
        A[name] = (1 - 0.5) * A[name] + 0.5 * B[name]
save_file(A, out, metadata={"format": "pt"})
with open(out, "r+b") as file:
    os.fsync(file.fileno())
"""
SD_MEH = """
import os, sys
from sd_meh.merge import merge_models, save_model
a, b, out = sys.argv[1:]
model = merge_models({"model_a": a, "model_b": b}, {"alpha": [0.5] * 25}, {"alpha": 0.5}, "weighted_sum", precision=16)
save_model(model, out.removesuffix(".safetensors"), "safetensors")
with open(out, "r+b") as file:
    os.fsync(file.fileno())
"""
SD_MECHA = """
import os, sys
import sd_mecha
a, b, out = sys.argv[1:]
sd_mecha.merge(sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=0.5), output=out)
with open(out, "r+b") as file:
    os.fsync(file.fileno())
"""
MEMORY = """
import json, os, sys, threading, time
def anonymous():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem")))
import torch
peak = loaded = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
threading.Thread(target=watch, daemon=True).start()
import blockmerge
a, b, out, options = sys.argv[1:]
blockmerge.merge(a, b, output=out, overwrite=True, **json.loads(options))
done.set()
print(json.dumps([loaded / 1e3, max(peak, anonymous()) / 1e3]))
"""


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def process(code: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def copy(a: Path, output: Path) -> None:
    subprocess.run(["cp", "--reflink=never", a, output], check=True)
    with output.open("r+b") as file:
        os.fsync(file.fileno())


def write_only(size: int, output: Path) -> None:
    """What the disk allows: as many bytes, written past the page cache and flushed, by a program that does nothing else."""
    of = [f"of={output}", "oflag=direct", "conv=fsync"]
    subprocess.run(["dd", "if=/dev/zero", "bs=8M", f"count={-(-size // (8 << 20))}", *of], check=True, stderr=subprocess.DEVNULL)


def contestants(a: Path, b: Path, output: Path, peers: bool) -> dict[str, Callable[[], object]]:
    import torch  # noqa: F401 (loaded before anything is timed)

    import blockmerge

    command = [sys.executable, "-m", "blockmerge", a, b, "--overwrite", "-o", output]

    def run(*options: str) -> object:
        return subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)

    found: dict[str, Callable[[], object]] = {
        "cp + fsync": lambda: copy(a, output),
        "write only": lambda: write_only(a.stat().st_size, output),
        "load and save (process)": lambda: process(LOAD_AND_SAVE, a, b, output),
        "merge, high_res": lambda: blockmerge.merge(a, b, preset="high_res", output=output, overwrite=True),
        "merge, flat 0.5": lambda: blockmerge.merge(a, b, weights=0.5, output=output, overwrite=True),
        "command, high_res": lambda: run("-p", "high_res"),
        "command, flat 0.5": lambda: run("-w", "0.5"),
    }
    for name, module, code in (("sd-meh", "sd_meh", SD_MEH), ("sd-mecha", "sd_mecha", SD_MECHA)):
        if peers and importlib.util.find_spec(module):
            found[f"{name}, flat 0.5 (process)"] = lambda code=code: process(code, a, b, output)  # type: ignore[misc]
        elif peers:
            print(f"{name} is not installed")
    return found


def measure(actions: dict[str, Callable[[], object]], output: Path, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name in random.sample(list(actions), len(actions)):
            output.unlink(missing_ok=True)
            spent = timed(actions[name])
            if number:  # the first round warms up
                seconds[name].append(spent)
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    def ratio(name: str, to: str) -> str:
        return f"{statistics.median(mine / theirs for mine, theirs in zip(seconds[name], seconds[to], strict=True)):.2f}"

    print("\n| what | median s | min–max s | ÷ cp + fsync | ÷ load and save |\n| --- | --- | --- | --- | --- |")
    for name, times in seconds.items():
        span = f"{min(times):.2f}–{max(times):.2f}"
        to_cp, to_load = ratio(name, "cp + fsync"), ratio(name, "load and save (process)")
        print(f"| {name} | {statistics.median(times):.2f} | {span} | {to_cp} | {to_load} |")


def report_memory(a: Path, b: Path, output: Path) -> None:
    if not Path("/proc/self/status").exists():
        return
    print("\n| peak anonymous memory | `import torch` MB | merge MB | above MB |\n| --- | --- | --- | --- |")
    for options in ({"preset": "high_res"}, {"weights": 0.5}):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, a, b, output, json.dumps(options)], check=True, capture_output=True, text=True
        )
        loaded, peak = json.loads(done.stdout)
        print(f"| {' '.join(map(str, next(iter(options.items()))))} | {loaded:.0f} | {peak:.0f} | {peak - loaded:.0f} |")


def machine(folder: Path) -> str:
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False).stdout.strip()
    memory = next((int(line.split()[1]) / 1e6 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    import torch

    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{model}, {os.cpu_count()} processors, {memory:.0f} GB memory, {kind} file system; {system}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the files here; a temp folder by default")
    parser.add_argument("--peers", action="store_true", help="also sd-meh and sd-mecha, where installed")
    parser.add_argument("--buffered", action="store_true", help="without direct writes, as on systems that lack them")
    parser.add_argument("--memory-only", action="store_true", help="only the peak of memory")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="blockmerge-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    a, b, output = (folder / f"{arguments.family}-{name}.safetensors" for name in ("a", "b", "out"))
    if arguments.buffered and hasattr(os, "O_DIRECT"):
        del os.O_DIRECT  # in this process; the commands' own keep it
    try:
        if not a.exists() or not b.exists():
            from blockmerge.demo import write_pair

            print(f"making two {arguments.family} models in {folder}", file=sys.stderr)
            write_pair(a, b, arguments.family, full_size=True, overwrite=True)
        for path in (a, b):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        print(f"{machine(folder)}\n{arguments.family}, {a.stat().st_size / 1e9:.2f} GB each, {arguments.rounds} rounds")
        if not arguments.memory_only:
            report(measure(contestants(a, b, output, arguments.peers), output, arguments.rounds))
        report_memory(a, b, output)
    finally:
        output.unlink(missing_ok=True)
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
