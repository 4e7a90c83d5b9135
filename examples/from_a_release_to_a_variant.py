"""From somebody's release to a variant of one's own: what made it, whether that is true, and one block
changed.

    python examples/from_a_release_to_a_variant.py [FOLDER]

Makes its own thin models; with real ones, only the paths differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import blockmerge
from blockmerge.demo import write_pair

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "blockmerge-example")
folder.mkdir(exist_ok=True)
base, detailed, style, spare, release, variant = (
    folder / f"{name}.safetensors" for name in ("base", "detailed", "style", "spare", "release", "variant")
)
write_pair(base, detailed, "sd1", overwrite=True)
write_pair(style, spare, "sd1", seed=1, overwrite=True)

# The release: two stages, in one pass.
detail = blockmerge.Merge(base, detailed, preset="high_res")
blockmerge.merge(detail, style, preset="low_res", dtype="fp16", output=release, overwrite=True)

# Its models may be called anything by now: they are found by what is in them.
style.replace(folder / "renamed.safetensors")

found = blockmerge.verify(release)
print(f"{found.name}: {'what its recipe makes' if found.same else 'not what its recipe makes'}")
print(f"made from {', '.join(found.models)}")

# The same with more of the style in the text encoder.
result = blockmerge.again(release, changes=["BASE=0.5"], output=variant, overwrite=True)
print(f"{result.output.name}: BASE is {result.weights['BASE']:g} now")
