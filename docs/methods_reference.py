"""Writes docs/methods.md from what the methods say of themselves: `make docs`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from blockmerge.methods import METHODS, PURPOSES, Method

_HEAD = """# The methods

Written by `make docs` from the definitions in `blockmerge/methods/builtin/`. `blockmerge methods` lists them,
`blockmerge methods NAME` shows one.

A, B, C are one tensor of each model, α (alpha) and β (beta) the block's weights; Xᵢ are all models, of which
A is the first. Halves and 8-bit floats are combined in float32, float32 in float64, and the result is rounded
once. Of finite weights every method makes finite ones, unless the result is beyond the range of the output's
dtype, or a step on the way to it (a difference of two tensors, a product with α or β) beyond that of the
dtype it is computed in. Only bf16 and float64 come near the latter, which are combined in a dtype of the same
range: bf16 is safe up to 1.7·10³⁸, half of the largest float32, as long as α and β are from 0 to 1. What
overflows is refused, not written.

"""

_TAIL = """
## How to read the tables

*Looks at* is how much of a tensor a result depends on, and so how a merge may cut its work. A
method that looks at all tensors reads the models twice: once for the figures that it needs, once to merge.

SuperMerger's *self* and *plus random* leave all tensors alone that have `to_out`, `proj_out` or `norm` in
their names; `scale` and `add_noise` take them, too. With `--rules ":to_out proj_out norm:skip"` they do not.

*Copied at*: the weights, or pairs (α, β), at which the result is an input, bit for bit; the other models are
not even read there. `tensor_sum` always takes whole rows as they are.

## Where a formula has no value

| method | where | the result |
| --- | --- | --- |
| `slerp` | A and B are parallel, opposite, or one is 0 | weighted_sum |
| `train_difference` | A = B = C | A |
| `extract` | B or C is A along a whole last axis | the cosine counts as 0 |
| `cosine_a`, `cosine_b` | a column of zeros; min = max | A |
| `ties` | the kept deltas add up to 0 | A |
| `model_stock` | the mean cosine is not above 0; a delta of zeros has the cosine 0 | A |

## Shares and counts

Shares are read as the decimal numbers that they are written as: α = 0.29 of 100 rows are 29, though the
double nearest to 0.29 is a little less. `ties` keeps ⌈k·n⌉ of n values, and all that are as large as the
smallest of them.

## Chance

What `add_noise` and `dare` draw depends on the seed, the tensor's LDM name and the element's position alone:
the first 64 bits of the SHA-256 of both are a key, and SplitMix64, started there, gives 16 bits for each
position. Two normal numbers that are neighbours are one of 65,536 equally likely pairs, a Hammersley set of
as many normal quantiles, rounded to float16. So the same seed gives the same file with any number of threads,
on one kind of processor.

## A method of your own

```python
import blockmerge


@blockmerge.merge_method(formula="A + α·γ·(B − A)")
def soften(a, b, *, alpha, gamma=0.5):
    return a + alpha * gamma * (b - a)


blockmerge.merge_state_dicts(a, b, weights=0.3, method=soften)
```

Or from the command line, with the function in `mine.py` in the current folder or wherever Python looks:
`blockmerge a.safetensors b.safetensors --weights 0.3 --method mine:soften`. It runs as part of the merge,
with all that you may do yourself.

Parameters by position are the models (`*others` for any number), `alpha` and `beta` are the weights, other
keywords are numbers with a default, none named like an argument of `merge` but `seed`; on the command line
they are given as `--number gamma=0.2`. The tensors are copies in float32 or float64, and what is returned is
rounded once. [examples/own_method.py](../examples/own_method.py) is one to start from.

The built-in methods are defined in the same way, with all that the decorator takes:

- `locality` says what the function must see at once. `"element"`, the default: any stretch of a tensor, flat.
  `"row"`: any entries of the first axis. `"tensor"`: the whole. `"model"`: the whole, after `passes`.
- `formula` and `source` are texts, for `blockmerge methods`.
- `copies` is a function of alpha and beta: the number of the model (0 is A) whose bytes the result is, which
  is then copied, or None. `blockmerge.methods.planning` has `a_at_zero`, `a_to_b` and others.
- `numbers` says more about numbers, with `Number` from `blockmerge.methods`:
  `[Number("gamma", text="how soft", low=0, high=1)]`.
- `chance=True`: the function takes the keywords `key` and `position`, and a merge its `seed`.
- `rows`, for `"row"`, is a function of shape, alpha and beta: stretches (start, stop, model) of the first
  axis, which are copied without the function.
- `passes`, for `"model"`, are two functions. The first gives the figures of one tensor of each model. The
  second makes of those of all tensors, a list in any order, what the function takes as
  the keyword `gathered`.

Random numbers come from `blockmerge.methods.randomness`, so that a tensor gets the same ones however it is
cut: `normal(key, position, count, device)` are normal numbers, `chosen(rate, key, position, count, device)`
is 1 with the probability `rate`/65,536 and else 0. Both are flat and good until the next call.

```python
from blockmerge.methods.randomness import normal


@blockmerge.merge_method(chance=True)
def jitter(a, b, *, alpha, key, position, amount=0.01):
    return a + alpha * (b - a) + amount * normal(key, position, a.numel(), a.device)


@blockmerge.merge_method(
    locality="model",
    passes=(lambda a, b: (b - a).abs().max(), lambda figures: max(float(one) for one in figures)),
)
def levelled(a, b, *, alpha, gathered):
    return a + alpha * (b - a) / gathered if gathered else a
```

A function with a keyword `out`, without a default, writes its result into `out` and rounds it itself. It gets
the tensors as they are, of any float dtypes, and `out` may be the memory of A.
"""

_COPIED = {0: "A", 1: "B", 2: "C"}


def reference() -> str:
    """Return the text of docs/methods.md."""
    tables = [f"## {purpose}\n\n{_table(names)}" for purpose, names in PURPOSES.items()]
    return _HEAD + "\n".join(tables) + _TAIL


def _table(names: Iterable[str]) -> str:
    rows = [
        "| method | models | weights and numbers | result | looks at | copied at | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [f"| {' | '.join(_cells(METHODS[name]))} |" for name in names]
    return "\n".join(rows) + "\n"


def _cells(method: Method) -> list[str]:
    takes = [name if default is None else f"{name} = {default:g}" for name, default in method.weights.items()]
    takes += [
        f"{number.name} = {'1 each' if number.default is None else f'{number.default:g}'}"
        for number in method.numbers
    ]
    count = str(method.models) if method.models is not None else f"{method.least} or more"
    return [
        f"`{method.name}`",
        count,
        ", ".join(takes),
        method.formula.replace("|", "\\|"),
        method.locality,
        _copied(method),
        method.source,
    ]


def _copied(method: Method) -> str:
    if "beta" not in method.weights:
        found = [(f"α = {alpha}", method.copies(alpha)) for alpha in (0, 1)]
    else:
        found = [
            (f"({alpha}, {beta})", method.copies(alpha, beta)) for alpha, beta in ((0, 0), (1, 0), (0, 1))
        ]
    return (
        ", ".join(f"{_COPIED[source]}: {weights}" for weights, source in found if source is not None) or "–"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(reference(), encoding="utf-8")
