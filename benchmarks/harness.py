"""What the benchmarks share: full-size models, paired rounds, peak memory, and the words about the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import truediv
from pathlib import Path
from typing import Any

from blockmerge.anatomy import FAMILIES, Family

PEAK_MEMORY = """
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
ACTION
done.set()
print(json.dumps([loaded / 1e3, max(peak, anonymous()) / 1e3]))
"""


def arguments(doc: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Parse the options that all benchmarks have, and `more`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--family", default="sd1", choices=list(FAMILIES))
    parser.add_argument("--blocks", help="how many a family of counted blocks has in each list: 5,9")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the files here; a temp folder by default")
    for name, options in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser.parse_args()


def family_of(chosen: argparse.Namespace) -> Family:
    """The family that was chosen, with so many blocks as were asked for."""
    family = FAMILIES[chosen.family]
    return family.sized(tuple(map(int, chosen.blocks.split(",")))) if chosen.blocks else family


@contextmanager
def full_size_pair(chosen: argparse.Namespace) -> Iterator[tuple[Path, Path, Path]]:
    """Give a pair of full-size models, made if need be and read once, and a path for an output; say what runs
    where.
    """
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="blockmerge-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    called = f"{chosen.family}{(chosen.blocks or '').replace(',', '-')}"
    a, b, output = (folder / f"{called}-{name}.safetensors" for name in ("a", "b", "out"))
    try:
        if not a.exists() or not b.exists():
            from blockmerge.demo import write_pair

            print(f"making two {chosen.family} models in {folder}", file=sys.stderr)
            # SD's models are published in half precision, transformers in bfloat16.
            family = family_of(chosen)
            dtype = "F16" if family.arms else "BF16"
            write_pair(a, b, family, full_size=True, overwrite=True, dtypes=(dtype, dtype))
        for path in (a, b):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        print(
            f"{machine(folder)}\n{chosen.family}, {a.stat().st_size / 1e9:.2f} GB each, {chosen.rounds} "
            "rounds"
        )
        yield a, b, output
    finally:
        output.unlink(missing_ok=True)
        if chosen.folder is None:
            shutil.rmtree(folder)


def process(code: str, *values: object) -> str:
    """Run Python code in a process of its own and return what it prints."""
    # Installed packages come compiled; the flag would have every process compile this one anew.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code, *map(str, values)]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ).stdout


def peak_memory(action: str, *values: object) -> tuple[float, float]:
    """Megabytes after `import torch`, and at the peak while `action` (code, `sys.argv[1:]` being `values`)
    runs. Linux.
    """
    loaded, peak = json.loads(process(PEAK_MEMORY.replace("ACTION", action), *values))
    return loaded, peak


def measure(
    actions: dict[str, Callable[[], float]], rounds: int, before: Callable[[], object]
) -> dict[str, list[float]]:
    """Run every action once in every round, in random order, `before` each; an action returns its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name in random.sample(list(actions), len(actions)):
            before()
            spent = actions[name]()
            if number:  # the first round warms up
                seconds[name].append(spent)
    return seconds


def report(seconds: dict[str, list[float]], beside: Sequence[str]) -> None:
    """Print medians, and the medians of the ratios within a round to each of `beside`."""

    def ratio(name: str, to: str) -> str:
        return f"{statistics.median(map(truediv, seconds[name], seconds[to])):.2f}"

    headings = " | ".join(f"÷ {to}" for to in beside)
    print(f"\n| what | median s | min–max s | {headings} |\n| --- | --- | --- |{' --- |' * len(beside)}")
    for name, times in seconds.items():
        ratios = " | ".join(ratio(name, to) for to in beside)
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f}–{max(times):.2f} | {ratios} |")


def report_memory(actions: dict[str, tuple[str, Sequence[object]]]) -> None:
    """Print the peak of anonymous memory of each action (code and its values) beside that of `import
    torch`.
    """
    if not Path("/proc/self/status").exists():
        return
    print("\n| peak anonymous memory | `import torch` MB | with it MB | more MB |\n| --- | --- | --- | --- |")
    for name, (code, values) in actions.items():
        loaded, peak = peak_memory(code, *values)
        print(f"| {name} | {loaded:.0f} | {peak:.0f} | {peak - loaded:.0f} |")


def machine(folder: Path) -> str:
    """Processor, memory, file system and versions."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False
    ).stdout.strip()
    memory = next(
        (int(line.split()[1]) / 1e6 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    import torch

    system = (
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )
    return f"{model}, {os.cpu_count()} processors, {memory:.0f} GB memory, {kind} file system; {system}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
