"""How long a merge of scaled fp8 takes, beside one of plain fp8.

    python benchmarks/quantised.py [--family sdxl] [--rounds 5] [--folder DIR]

Makes a full-size pair with the project's own generator (kept in --folder, when one is given), and of A a file
in plain fp8, one in scaled fp8 with a scale for each weight, in the old names, and one with a scale for each
row, in the new ones. Then it merges each with B into bf16, in rounds, each in a random order. Ratios are
taken within a round. Files are warm (read once before); fsync of the output is included. Memory is the peak
of anonymous memory (Linux), beside that of `import torch`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import arguments, full_size_pair, measure, report, report_memory

MERGE = """
import sys
blockmerge.merge(*sys.argv[1:3], weights=0.5, dtype="bf16", output=sys.argv[3], overwrite=True)
"""
PLAIN, ONE_EACH, ONE_A_ROW = "plain fp8", "scaled fp8, a scale each", "scaled fp8, a scale a row"


def main() -> None:
    chosen = arguments(__doc__)
    with full_size_pair(chosen) as (a, b, output):
        files = {kind: in_fp8(a, kind) for kind in (PLAIN, ONE_EACH, ONE_A_ROW)}
        try:
            merges = {kind: partial(merge, path, b, output) for kind, path in files.items()}
            report(measure(merges, chosen.rounds, lambda: output.unlink(missing_ok=True)), [PLAIN])
            report_memory({kind: (MERGE, (path, b, output)) for kind, path in files.items()})
        finally:
            for path in files.values():
                path.unlink()


def merge(a: Path, b: Path, output: Path) -> float:
    import blockmerge

    started = time.perf_counter()
    blockmerge.merge(a, b, weights=0.5, dtype="bf16", output=output, overwrite=True)
    return time.perf_counter() - started


def in_fp8(a: Path, kind: str) -> Path:
    """Write a file beside A with its matrices and convolutions in 8-bit floats."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    scales: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        ONE_EACH: lambda weight: weight.abs().max(),
        ONE_A_ROW: lambda weight: weight.abs().flatten(1).amax(1),
    }
    said = torch.frombuffer(bytearray(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    tensors = {} if kind != ONE_EACH else {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    with safe_open(a, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            tensor = file.get_tensor(name)
            if not name.endswith(".weight") or tensor.dim() < 2:
                tensors[name] = tensor.clone()
                continue
            weight = tensor.float()
            if kind != PLAIN:
                layer = name.removesuffix("weight")
                scale = (scales[kind](weight) / 448).clamp(min=2.0**-60)
                weight /= scale.view(-1, *[1] * (weight.dim() - 1)) if scale.dim() else scale
                tensors[layer + ("scale_weight" if kind == ONE_EACH else "weight_scale")] = scale
                if kind == ONE_A_ROW:
                    tensors[f"{layer}comfy_quant"] = said.clone()
            tensors[name] = weight.clamp_(-448, 448).to(torch.float8_e4m3fn)
    path = a.with_name(f"{kind.replace(' ', '-').replace(',', '')}.safetensors")
    save_file(tensors, path)
    return path


if __name__ == "__main__":
    main()
