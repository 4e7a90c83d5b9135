"""The story of AnimeDiffusion, from beginning to end: a base, a second model, a high_res merge, and what it
gives away.

    python examples/where_it_comes_from.py [FOLDER]

Makes its own thin models; with real ones, only the paths differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import blockmerge
from blockmerge.demo import write_pair

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "blockmerge-example")
folder.mkdir(exist_ok=True)
base, detailed, anime = (folder / f"{name}.safetensors" for name in ("base", "detailed", "anime"))
write_pair(base, detailed, "sd1", overwrite=True)

# The merge: the blocks of high resolution from the detailed model, the others from the base.
blockmerge.merge(base, detailed, preset="high_res", output=anime, overwrite=True)

# How alike it is to both: the published attention similarity, and the weights themselves.
for method in ("attention", "weights"):
    report = blockmerge.similarity(anime, [base, detailed], method=method)
    for found in report.references:
        print(f"{method} similarity to {found.name}: {found.similarity:.6g}")

# Where it comes from: the parents, the method and the preset are found again.
origin = blockmerge.explain(anime, [detailed, base])
print(origin.verdict)
for block in ("IN01", "IN04", "IN06", "M00"):
    weight = origin.blocks[block].weights[detailed.name]
    print(f"{block} took {weight:g} of {detailed.name} (± {origin.blocks[block].uncertainty:.4f})")
