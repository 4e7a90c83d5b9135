"""How long comparisons take, how much memory and how much of the files, beside scripts that load whole
models.

    python benchmarks/compare.py [--family sd1] [--rounds 5] [--folder DIR]

Makes a full-size pair with the project's own generator (kept in --folder, when one is given) and runs paired
rounds of

  attention, whole models   load_file of both, then the published procedure with nn.Linear, as its users ran
                            it
  attention                 blockmerge.similarity
  weights, whole models     load_file of both, then torch.nn.functional.cosine_similarity on float32 copies,
                            tensor by tensor
  weights                   blockmerge.similarity(method="weights"), which also finds differences, per block
                            and component
  explain                   blockmerge.explain of a high_res merge of the two (SD1 and SD2: with a random
                            weight per block)

each in a process of its own, timed from when torch has been imported. Ratios are taken within a round.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from harness import arguments, full_size_pair, measure, process, report, report_memory

TIMED = """
import sys, time
import torch
started = time.perf_counter()
ACTION
print(time.perf_counter() - started)
"""
NAIVE_ATTENTION = """
from torch import nn
from safetensors.torch import load_file
torch.manual_seed(114514)
a, b = map(load_file, sys.argv[1:3])
def attention(layers, x):
    q, k, v = (layer(x) for layer in layers)
    return torch.einsum("ik,jk->ik", torch.softmax(torch.einsum("ij,kj->ik", q, k), dim=-1), v)
total = 0
with torch.no_grad():
    for block in range(3, 11):
        name = f"model.diffusion_model.output_blocks.{block}.1.transformer_blocks.0.attn1.to_"
        width = a[name + "q.weight"].shape[0]
        x = torch.randn(width, width)
        maps = []
        for model in (a, b):
            layers = [nn.Linear(width, width, bias=False) for _ in "qkv"]
            for letter, layer in zip("qkv", layers):
                layer.weight.data = model[f"{name}{letter}.weight"].float()
            maps.append(attention(layers, x))
        total += torch.cosine_similarity(*maps).mean().item() / 8
"""
NAIVE_WEIGHTS = """
from safetensors.torch import load_file
a, b = map(load_file, sys.argv[1:3])
for name, tensor in a.items():
    if tensor.is_floating_point():
        torch.nn.functional.cosine_similarity(tensor.float().flatten(), b[name].float().flatten(), dim=0)
"""
ATTENTION = "import blockmerge; blockmerge.similarity(*sys.argv[1:3])"
WEIGHTS = "import blockmerge; blockmerge.similarity(*sys.argv[1:3], method='weights')"
EXPLAIN = "import blockmerge; blockmerge.explain(sys.argv[3], sys.argv[1:3])"
BYTES_READ = """
import sys, torch, blockmerge
blockmerge.similarity(sys.argv[3], sys.argv[4])  # everything that has to be imported is
def read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
before = read()
blockmerge.similarity(*sys.argv[1:3])
print(read() - before)
"""
EXPLAINED = """
import json, sys, blockmerge
found = blockmerge.explain(sys.argv[3], sys.argv[1:3])
other, = (name for name in found.parents if name != found.base)
weights = {block: origin.weights[other] for block, origin in found.blocks.items()}
of_b = weights if other == found.candidates[1] else {block: 1 - weight for block, weight in weights.items()}
print(json.dumps([found.exact, of_b]))
"""


def clocked(code: str, *values: object) -> float:
    return float(process(TIMED.replace("ACTION", code), *values))


def main() -> None:
    chosen = arguments(__doc__ or "")
    with full_size_pair(chosen) as (a, b, output):
        import blockmerge
        from blockmerge.demo import write_pair
        from blockmerge.weights import BlockWeights

        blocks = blockmerge.load_preset("high_res").for_sdxl().blocks if chosen.family == "sdxl" else None
        shape = BlockWeights.flat(0.0, blocks) if blocks else BlockWeights.flat(0.0)
        weights = dict(zip(shape, np.random.default_rng(4).random(len(shape)).tolist(), strict=True))
        blockmerge.merge(a, b, weights=weights, output=output, overwrite=True)
        actions = {
            "attention": partial(clocked, ATTENTION, a, b),
            "weights, whole models": partial(clocked, NAIVE_WEIGHTS, a, b),
            "weights": partial(clocked, WEIGHTS, a, b),
            "explain": partial(clocked, EXPLAIN, a, b, output),
        }
        if chosen.family != "sdxl":
            actions = {"attention, whole models": partial(clocked, NAIVE_ATTENTION, a, b), **actions}
        seconds = measure(actions, chosen.rounds, lambda: None)
        report(seconds, [name for name in actions if "whole models" in name])
        links = [output.with_name(f"link-{number}.safetensors") for number in range(12)]
        for link in links:  # files of their own names: the same one named twice is read once
            link.unlink(missing_ok=True)
            os.link(b, link)
        report_memory(
            {
                "attention": (ATTENTION, (a, b)),
                "weights": (WEIGHTS, (a, b)),
                "weights, 12 references": (
                    WEIGHTS.replace("*sys.argv[1:3]", "sys.argv[1], sys.argv[2:]"),
                    (a, *links),
                ),
                "explain": (EXPLAIN, (a, b, output)),
            }
        )
        for link in links:
            link.unlink()
        thin = [output.with_name(f"thin-{name}.safetensors") for name in "ab"]
        try:
            write_pair(*thin, chosen.family, overwrite=True)
            if Path("/proc/self/io").exists():
                read = int(process(BYTES_READ, a, b, *thin))
                print(
                    f"\nattention reads {read / (a.stat().st_size + b.stat().st_size):.2%} of the files' "
                    "bytes"
                )
        finally:
            for path in thin:
                path.unlink(missing_ok=True)
        exact, found = json.loads(process(EXPLAINED, a, b, output))
        worst = max(abs(found[block] - weight) for block, weight in weights.items())
        print(f"explain: exact {exact}, the worst of {len(weights)} weights is off by {worst:.1e}")


if __name__ == "__main__":
    main()
