"""The verdict of `explain` in words."""

from __future__ import annotations

from blockmerge.anatomy import FAMILIES, TITLES
from blockmerge.errors import shown
from blockmerge.explaining.explanation import Explanation

_TITLES = {
    "weighted_sum": "a weighted sum",
    "add_difference": "add difference",
    "triple_sum": "a triple sum",
    "linear": "a linear combination",
}
_SLACK = 0.005  # of a weight, which rounding may have moved


def write_verdict(found: Explanation, *, agrees: bool, by_tensor: bool) -> str:
    """One or two sentences about where a merge comes from."""
    if not found.parents:
        return _without_parents(found)
    what = _what_it_is(found)
    if found.preset is not None:
        what += f" with the preset {shown(found.preset)}"
    if by_tensor:
        what += ", with weights that change within blocks (--tensors shows them)"
    unknown = sum(not origin.determined for origin in found.blocks.values())
    if found.method != "copy" and unknown:
        what += f"; in {unknown} of {len(found.blocks)} blocks the weights cannot be determined"
    if found.exact:
        again = "it is the same within two steps of its dtype everywhere."
    elif agrees:
        again = "all that was compared is the same within two steps of its dtype: see the notes."
    else:
        again = "it is not the same everywhere: see the notes and residuals."
    return f"{what}. Merged again, {again}"


def _what_it_is(found: Explanation) -> str:
    merge, (base, *others) = shown(found.merge), [shown(name) for name in found.parents]
    if found.method == "copy":
        return (
            f"{merge} is a copy of {base}{_other_parts(found)}"
            if found.exact
            else f"The {_core(found)} of {merge} is that of {base}"
        )
    if found.method == "add_difference":
        added, taken = others
        return f"{merge} is {base} plus the difference of {added} from {taken} (add difference)"
    *first, last = base, *others
    method = found.method or "linear"
    what = "a weighted average" if method == "linear" and _is_average(found) else _TITLES[method]
    return f"{merge} is {what} of {', '.join(first)} and {last}"


def _other_parts(found: Explanation) -> str:
    """What is copied beside the U-Net: ``" (text encoder and VAE, too)"``."""
    parts = [TITLES.get(name, name) for name in found.components if name != "unet"]
    *first, last = parts or [""]
    return f" ({', '.join(first)} and {last}, too)" if first else f" ({last}, too)" if last else ""


def _core(found: Explanation) -> str:
    return FAMILIES[found.family].core_title


def _is_average(found: Explanation) -> bool:
    """Whether no block of the U-Net took less than nothing of a parent, the base among them, or more than
    all.
    """
    for block, origin in found.blocks.items():
        shares = [weight for weight in origin.weights.values() if weight is not None]
        if block != "BASE" and not all(
            -_SLACK <= share <= 1 + _SLACK for share in (*shares, 1 - sum(shares))
        ):
            return False
    return True


def _without_parents(found: Explanation) -> str:
    merge, base = shown(found.merge), shown(found.base)
    unet = [origin for block, origin in found.blocks.items() if block != "BASE"]
    others = [shown(name) for name in unet[0].weights if name != found.base]
    if not others:
        return f"{merge} is not a copy of {base}; with another candidate, more could be said."
    explained = sum(origin.explained for origin in unet)
    if explained == len(unet):
        return (
            f"At its dtype, {merge} cannot be distinguished from merges of {base} with the others: "
            "they differ by less than rounding."
        )
    worst = max(origin.residual or 0.0 for origin in unet)
    text = (
        f"{merge} is not, or not only, a merge of these: the best two leave up to {worst:.2%} of the largest "
        f"difference unexplained in a block, far more than rounding. The nearest is {base}"
    )
    if not explained:
        return f"{text}."
    return (
        f"{text}; {base} and {others[0]} do explain {explained} of {len(unet)} blocks of the {_core(found)}."
    )
