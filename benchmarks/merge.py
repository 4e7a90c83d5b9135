"""How long a merge takes and how much memory, beside a copy and beside load-everything-and-save.

    python benchmarks/merge.py [--family sd1] [--rounds 5] [--folder DIR] [--peers] [--buffered] [--formats]

Makes a full-size pair with the project's own generator (kept in --folder, when one is given), then runs
paired rounds of

  cp            cp --reflink=never of A, and fsync of the copy
  write only    dd of as many bytes, direct and fsync: what the disk allows, whatever the program
  load and save a whole process: safetensors' load_file of both, one loop over the tensors, save_file, fsync
  merge …       blockmerge.merge in this process, torch loaded; fsync included
  command …     the whole command `blockmerge A B`, a fresh process
  peers         sd-mecha and sd-meh, whole processes, where they are installed

Every round runs each of them once, in a random order, and ratios are taken within a round: these are what to
compare, since seconds depend on the machine and on what else it is doing. Files are warm (read once before).
Memory is the peak of anonymous memory (RssAnon and RssShmem, Linux), sampled every 5 ms in a process of its
own, beside the same of `import torch`.

With --formats it compares the forms that models come in instead: the same pair as .ckpt files and as
diffusers folders, and one real chore, fp32 EMA weights in a .ckpt made into an fp16 model with another VAE.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import arguments, full_size_pair, measure, process, report, report_memory

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
models, weights, base = {"model_a": a, "model_b": b}, {"alpha": [0.5] * 25}, {"alpha": 0.5}
model = merge_models(models, weights, base, "weighted_sum", precision=16)
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


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def copy(a: Path, output: Path) -> None:
    subprocess.run(["cp", "--reflink=never", a, output], check=True)
    with output.open("r+b") as file:
        os.fsync(file.fileno())


def write_only(size: int, output: Path) -> None:
    """What the disk allows: as many bytes, written past the page cache and flushed, by a program that does
    nothing else.
    """
    of = [f"of={output}", "oflag=direct", "conv=fsync"]
    subprocess.run(
        ["dd", "if=/dev/zero", "bs=8M", f"count={-(-size // (8 << 20))}", *of],
        check=True,
        stderr=subprocess.DEVNULL,
    )


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
        "merge, flat 0.5, adjusted": lambda: blockmerge.merge(
            a, b, weights=0.5, adjust="0,0,0,1", output=output, overwrite=True
        ),
        "command, high_res": lambda: run("-p", "high_res"),
        "command, flat 0.5": lambda: run("-w", "0.5"),
    }
    for name, module, code in (("sd-meh", "sd_meh", SD_MEH), ("sd-mecha", "sd_mecha", SD_MECHA)):
        if peers and importlib.util.find_spec(module):
            found[f"{name}, flat 0.5 (process)"] = lambda code=code: process(code, a, b, output)  # type: ignore[misc]
        elif peers:
            print(f"{name} is not installed")
    return found


FORMATS = {
    "safetensors pair": "merge('sd-a.safetensors', 'sd-b.safetensors', weights=0.5, "
    "output='out.safetensors')",
    "zip .ckpt pair": "merge('a.ckpt', 'b.ckpt', weights=0.5, output='out.safetensors')",
    ".ckpt and folder, into a file": "merge('a.ckpt', 'b-folder', weights=0.5, output='out.safetensors')",
    "folders, into a folder": "merge('a-folder', 'b-folder', weights=0.5, output='out')",
    ".ckpt into a folder": "convert('a.ckpt', 'out', naming='diffusers')",
    "fp32 EMA .ckpt into fp16, with a "
    "VAE": "convert('ema.ckpt', 'out.safetensors', dtype='fp16', vae='vae.safetensors')",
}
"""What is run, in the folder of the forms."""


def write_forms(a: Path, b: Path, folder: Path) -> None:
    """Write the pair in the forms that FORMATS names, by torch.save where it is a .ckpt."""
    import torch
    from safetensors.torch import load_file, save_file

    import blockmerge

    for name, path in (("a", a), ("b", b)):
        (folder / f"sd-{name}.safetensors").symlink_to(path.resolve())
        tensors = load_file(path)
        torch.save({"state_dict": tensors}, folder / f"{name}.ckpt")
        blockmerge.convert(path, folder / f"{name}-folder", naming="diffusers")
    unet, vae = "model.diffusion_model.", "first_stage_model."
    ema = {
        "model_ema.diffusion_model" + name.removeprefix(unet).replace(".", ""): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(unet)
    }
    torch.save({"state_dict": ema}, folder / "ema.ckpt")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name.startswith(vae)}, folder / "vae.safetensors"
    )


def compare_formats(a: Path, b: Path, rounds: int) -> None:
    """Seconds of the forms, beside the plain pair's, and their memory."""
    import blockmerge

    def clear() -> None:
        Path("out.safetensors").unlink(missing_ok=True)
        shutil.rmtree("out", ignore_errors=True)

    with tempfile.TemporaryDirectory(dir=a.parent) as folder, contextlib.chdir(folder):
        write_forms(a, b, Path(folder))
        code = {name: f"blockmerge.{call}" for name, call in FORMATS.items()}
        actions = {
            name: partial(timed, partial(eval, line, {"blockmerge": blockmerge}))
            for name, line in code.items()
        }
        report(measure(actions, rounds, clear), ["safetensors pair"])
        clear()
        report_memory({name: (line[:-1] + ", overwrite=True)", ()) for name, line in code.items()})


def main() -> None:
    flag = {"action": "store_true"}
    chosen = arguments(
        __doc__ or "",
        peers={**flag, "help": "also sd-meh and sd-mecha, where installed"},
        buffered={**flag, "help": "without direct writes, as on systems that lack them"},
        formats={**flag, "help": "the forms that models come in, beside each other"},
        memory_only={**flag, "help": "only the peak of memory"},
    )
    if chosen.buffered and hasattr(os, "O_DIRECT"):
        del os.O_DIRECT  # in this process; the commands' own keep it
    merge = "blockmerge.merge(*sys.argv[1:3], output=sys.argv[3], overwrite=True, {})"
    with full_size_pair(chosen) as (a, b, output):
        if chosen.formats:
            compare_formats(a, b, chosen.rounds)
            return
        if not chosen.memory_only:
            actions = {
                name: partial(timed, action)
                for name, action in contestants(a, b, output, chosen.peers).items()
            }
            seconds = measure(actions, chosen.rounds, lambda: output.unlink(missing_ok=True))
            report(seconds, ["cp + fsync", "load and save (process)"])
        report_memory(
            {
                option: (merge.format(option), (a, b, output))
                for option in ("preset='high_res'", "weights=0.5")
            },
        )


if __name__ == "__main__":
    main()
