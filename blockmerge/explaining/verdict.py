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


def write_verdict(found: Explanation, *, agrees: bool, by_tensor: bool) -> str:
    """One or two sentences about where a merge comes from."""
    merge, parents = shown(found.merge), [shown(name) for name in found.parents]
    if not parents:
        return _no_parents(found)
    if found.method == "copy":
        what = f"The U-Net of {merge} is that of {parents[0]}"
    elif found.method == "add_difference":
        what = (
            f"{merge} is {parents[0]} plus the difference of {parents[1]} from {parents[2]} (add difference)"
        )
    else:
        what = (
            f"{merge} is {_TITLES[found.method or 'linear']} of {', '.join(parents[:-1])} and {parents[-1]}"
        )
    if found.preset is not None:
        what += f" with the preset {shown(found.preset)}"
    if by_tensor:
        what += ", with weights that change within blocks (--tensors shows them)"
    unknown = sum(not origin.determined for origin in found.blocks.values())
    if found.method != "copy" and unknown:
        what += f"; in {unknown} of {len(found.blocks)} blocks the weights cannot be told"
    if agrees and not found.exact:
        return (
            f"{what}. Merged again, all that was compared is the same within two steps of its dtype: see "
            "the notes."
        )
    if found.exact:
        return f"{what}. Merged again, it is the same within two steps of its dtype everywhere."
    return f"{what}. Merged again, it is not the same everywhere: see the notes and residuals."


def _no_parents(found: Explanation) -> str:
    merge, base = shown(found.merge), shown(found.base)
    unet = {block: origin for block, origin in found.blocks.items() if block != "BASE"}
    others = [name for name in next(iter(unet.values())).weights if name != found.base]
    if not others:
        return f"{merge} is not a copy of {base}; with another candidate, more could be said."
    fine = [block for block, origin in unet.items() if origin.explained]
    pair = f"{base} and {shown(others[0])}"
    if len(fine) == len(unet):
        return (
            f"At its dtype, {merge} cannot be told from merges of {base} with the others: they differ by "
            "less than rounding."
        )
    worst = max(origin.residual or 0.0 for origin in unet.values())
    text = (
        f"{merge} is not, or not only, a merge of these: the best two leave up to {worst:.2%} of the largest "
        "difference "
        f"unexplained in a block, far more than rounding. The nearest is {base}"
    )
    return (
        f"{text}; {pair} do explain {len(fine)} of {len(unet)} blocks of the U-Net." if fine else f"{text}."
    )
