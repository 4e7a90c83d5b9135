"""The kinds of adapter modules: which parts each is made of, and of what shapes these are: one table.

A shape is written in words, one for each axis, the last for all axes that are left. ``rows`` and ``columns``
are those of the module's own weight as a matrix (a convolution's as [out, in · kernel]), ``inputs`` and
``kernel`` are its columns taken apart; all other words are sizes that only have to be the same wherever they
stand in a module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

_NOTHING: frozenset[str] = frozenset()
_OF_LOW_RANK = frozenset(("alpha", "dora_scale", "diff_b"))
_OF_LORA = _OF_LOW_RANK | {"up_bias"}
_OF_OFT = frozenset(("alpha", "rescale"))

BESIDE: Mapping[str, str] = {
    "alpha": "",
    "dora_scale": "rows",  # or inputs, which its shape tells
    "up_bias": "rows",
    "diff_b": "rows",
    "b_norm": "rows",
    "rescale": "rows",
}
"""{part that modules have beside those of their form: its shape}."""


@dataclass(frozen=True)
class Form:
    """One kind of module, as one combination of parts: {part: shape}, and which it may have `beside` them.

    `rank` is the word for it; `rows` and `columns` say what those of the weight are products of, where that
    is not a word of their own; `renamed` is what other files call the parts that are meant.
    """

    kind: str
    parts: Mapping[str, str]
    beside: frozenset[str] = _NOTHING
    rank: str = ""
    rows: str = "rows"
    columns: str = "columns"
    renamed: Mapping[str, str] = field(default_factory=dict)

    def holds(self, parts: Collection[str]) -> bool:
        """Whether these are the parts of such a module, all of them and no others."""
        return self.parts.keys() <= set(parts) <= self.parts.keys() | self.beside


_FIRST = (
    ("", {"lokr_w1": "a b"}),
    ("s", {"lokr_w1_a": "a s", "lokr_w1_b": "s b"}),
)
_SECOND = (
    ("", "b d", {"lokr_w2": "c d"}),
    ("r", "b d", {"lokr_w2_a": "c r", "lokr_w2_b": "r d"}),
    ("r", "b d kernel", {"lokr_t2": "r r kernel", "lokr_w2_a": "r c", "lokr_w2_b": "r d"}),
)


def _lokr() -> Iterator[Form]:
    for other_rank, first in _FIRST:
        for rank, columns, second in _SECOND:
            yield Form("lokr", {**first, **second}, _OF_LOW_RANK, rank or other_rank, "a c", columns)


_GLORA = {"a1": "inputs r", "a2": "r inputs", "b1": "rows r", "b2": "r columns"}
_GLORA_SWAPPED = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}

FORMS: tuple[Form, ...] = (
    Form("lora", {"down": "r columns", "up": "rows r"}, _OF_LORA, "r"),
    Form(
        "locon",
        {"down": "r inputs", "mid": "r r kernel", "up": "rows r"},
        _OF_LORA,
        "r",
        columns="inputs kernel",
    ),
    Form(
        "loha",
        {"hada_w1_a": "rows r", "hada_w1_b": "r columns", "hada_w2_a": "rows s", "hada_w2_b": "s columns"},
        _OF_LOW_RANK,
        "r",
    ),
    Form(
        "loha",
        {
            "hada_t1": "r r kernel", "hada_w1_a": "r rows", "hada_w1_b": "r inputs",
            "hada_t2": "s s kernel", "hada_w2_a": "s rows", "hada_w2_b": "s inputs",
        },
        _OF_LOW_RANK,
        "r",
        columns="inputs kernel",
    ),
    *_lokr(),
    Form("full", {"diff": "rows columns"}, frozenset(("diff_b",))),
    Form("full", {"diff": "rows"}, frozenset(("diff_b",)), columns=""),
    Form("full", {"diff_b": "rows"}),
    Form("norm", {"w_norm": "rows"}, frozenset(("b_norm",)), columns=""),
    Form("norm", {"b_norm": "rows"}),
    Form("glora", _GLORA, frozenset(("alpha",)), "r"),
    Form(
        "glora",
        {_GLORA_SWAPPED[part]: words for part, words in _GLORA.items()},
        frozenset(("alpha",)),
        "r",
        renamed=_GLORA_SWAPPED,
    ),
    Form("ia3", {"ia3_weight": "inputs", "on_input": ""}),
    Form("ia3", {"ia3_weight": "rows", "on_input": ""}),
    Form("oft", {"oft_blocks": "n b b"}, _OF_OFT, rows="n b"),
    Form("oft", {"oft_diag": "n b b"}, _OF_OFT, rows="n b"),
    Form("boft", {"oft_blocks": "m n b b"}, _OF_OFT, rows="n b"),
)  # fmt: skip
"""Of forms with the same parts, the first that fits the weight counts."""

KINDS = ("lora", "locon", "loha", "lokr", "full", "norm", "dora", "glora", "ia3", "oft", "boft")
"""What modules are called in results; a low-rank one that has a magnitude vector is ``"dora"``."""

PRODUCTS = frozenset(("lora", "locon"))
"""The kinds that are one product, up·down."""

LOOKING_AT_WEIGHTS = frozenset(("dora", "glora", "ia3", "oft", "boft"))
"""The kinds whose change depends on the weight, so that it is not known without the model."""

OF_BIASES: Mapping[str, bool] = {"up_bias": True, "diff_b": False, "b_norm": False}
"""{part that is added to a bias: whether the module's factor counts}."""
