"""Writes docs/methods.md from what the methods say of themselves: `make docs`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from blockmerge.methods import METHODS, PURPOSES, Method

_HEAD = """# The methods

```sh
blockmerge methods                                                       # list them
blockmerge methods ties                                                  # show one, with its numbers
blockmerge a.safetensors b.safetensors -m slerp -w 0.5                   # merge with one
blockmerge a.safetensors b.safetensors c.safetensors -m ties -w 1 --density 0.3
```

[merge.md](merge.md#choose-a-method) says what each is good for. To write one yourself, see
[own_method.md](own_method.md). LDM names and other words are in the [glossary](glossary.md).
`make docs` writes this page from the definitions in `blockmerge/methods/builtin/`.

- A, B and C are one tensor of each model. Xᵢ stands for all models, of which A is the first.
- α (alpha) and β (beta) are the block's weights: `--weights` and `--weights-beta`.
- Other numbers have options of their own, such as `--density 0.3`.

"""

_TAIL = """
## How to read the tables

- **Looks at** says how much the method must see to compute one value: that element alone, its row, its
  tensor, or the whole model. Methods that look at the whole model read the models twice: once for the
  figures that they need, once to merge.
- **Copied at** gives the weights, or pairs (α, β), at which the result is one of the inputs, bit for bit.
  The other models are then not even read. `tensor_sum` always takes whole rows unchanged.

SuperMerger's *self* and *plus random* are `scale` and `add_noise` here. SuperMerger leaves out all tensors
with `to_out`, `proj_out` or `norm` in their names. blockmerge includes them. To leave them out, add
`--rules ":to_out proj_out norm:skip"`.

## Rounding and range

- fp16, bf16 and 8-bit floats are combined in float32, and float32 in float64. The result is rounded once.
- Every method turns finite weights into finite results, with two exceptions. The result may be beyond the
  range of the output's dtype. An intermediate value may be beyond the range of the dtype that it is
  computed in.
- Such a value is a difference of two tensors, or a product with α or β. This concerns only bf16 and
  float64, since they are combined in a dtype of the same range. With α and β from 0 to 1, bf16 is safe
  up to 1.7·10³⁸, half of the largest float32.
- What overflows is refused, not written.

## Where a formula has no value

| method | where | the result |
| --- | --- | --- |
| `slerp` | A and B are parallel, opposite, or one is 0 | weighted_sum |
| `train_difference` | A = B = C | A |
| `extract` | B or C equals A along a whole last axis | the cosine counts as 0 |
| `cosine_a`, `cosine_b` | a column of zeros; min = max | A |
| `ties` | the kept deltas add up to 0 | A |
| `model_stock` | the mean cosine is not above 0; a delta of zeros has the cosine 0 | A |

## Shares and counts

Shares are read as the decimal numbers that you write: α = 0.29 of 100 rows is 29 rows, although the double
nearest to 0.29 is a little less. `ties` keeps ⌈k·n⌉ of n values, and all others that are as
large as the smallest of these.

## Chance

`add_noise` and `dare` draw random numbers. What they draw depends on the seed, the tensor's LDM name and
the element's position alone. So the same seed gives the same file with any number of threads, on one kind
of processor.

In detail: the first 64 bits of the SHA-256 of seed and name are a key. SplitMix64, started there, gives 16
bits for each position. Two neighbouring normal numbers are one of 65,536 equally likely pairs. The pairs
are a Hammersley set of as many normal quantiles, rounded to float16.
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
