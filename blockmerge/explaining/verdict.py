"""The verdict of `explain` in words."""

from __future__ import annotations

from blockmerge.errors import shown
from blockmerge.explaining.explanation import Explanation

_TITLES = {
    "weighted_sum": "a weighted sum",
    "add_difference": "add difference",
    "triple_sum": "a triple sum",
    "linear": "a weighted average",
}


def write_verdict(found: Explanation, *, by_tensor: bool) -> str:
    """One or two sentences about where a merge comes from."""
    merge, parents = shown(found.merge), [shown(name) for name in found.parents]
    if not parents:
        nearest = max((origin.residual or 0.0 for name, origin in found.blocks.items() if name != "BASE"), default=0.0)
        return (
            f"{merge} is not, or not only, a merge of these: the best combination leaves up to {nearest:.2%} of the largest "
            f"difference unexplained in a block, far more than rounding. The nearest is {shown(found.base)}."
        )
    if found.method == "copy":
        what = f"The U-Net of {merge} is that of {parents[0]}"
    elif found.method == "add_difference":
        what = f"{merge} is {parents[0]} plus the difference of {parents[1]} from {parents[2]} (add difference)"
    else:
        what = f"{merge} is {_TITLES[found.method or 'linear']} of {', '.join(parents[:-1])} and {parents[-1]}"
    if found.preset is not None:
        what += f" with the preset {shown(found.preset)}"
    if by_tensor:
        what += ", with weights that change within blocks (--tensors shows them)"
    unknown = sum(not origin.determined for origin in found.blocks.values())
    if found.method != "copy" and unknown:
        what += f"; in {unknown} of {len(found.blocks)} blocks the weights cannot be told"
    if found.exact:
        return f"{what}. Merged again, it is the same within two steps of its dtype everywhere."
    return f"{what}. Merged again, it is not the same everywhere: see the notes and residuals."
