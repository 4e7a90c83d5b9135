"""Element rules: weights for single kinds of tensor, on top of those of the blocks.

``BLOCKS:ELEMENTS:RATIO``, several separated by commas or new lines: ``OUT03-OUT05:attn2:0.8, NOT
BASE:norm:0``. The grammar is SuperMerger's elemental merge, but that blanks at the edges of fields are taken
off, blocks are the family's own, and what cannot be read is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES, Family
from blockmerge.errors import RecipeError, WeightsError, shown
from blockmerge.weights.block_lists import family_named
from blockmerge.weights.block_weights import checked_weight
from blockmerge.weights.plain_numbers import finite_number
from blockmerge.weights.words import block_range, may_name_blocks

_FORM = "BLOCKS:ELEMENTS:RATIO, as in OUT03-OUT05:attn2:0.5"


@dataclass(frozen=True)
class Selection:
    """One field of a rule: any of its words, or with NOT all but its words; without words, everything."""

    words: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return " ".join((*(["NOT"] if self.negated else []), *self.words))

    def takes(self, matched: bool) -> bool:
        """Whether the field takes what one of its words matched, or none did."""
        return not self.words or matched is not self.negated


@dataclass(frozen=True)
class ElementRule:
    """The weight of the tensors that both fields take; None leaves them out of the merge (`skip`)."""

    blocks: Selection
    elements: Selection
    ratio: float | None

    def __str__(self) -> str:
        ratio = "skip" if self.ratio is None else repr(self.ratio).removesuffix(".0")
        return f"{self.blocks}:{self.elements}:{ratio}"


@dataclass(frozen=True)
class ElementRules:
    """Element rules as they are written, before the family is known; `str` gives the text back.

    >>> rules = ElementRules.parse("OUT06:attn:0.5, OUT06:attn2.to_k:0.2").resolve("sd1")
    >>> name = "model.diffusion_model.output_blocks.6.1.transformer_blocks.0.attn2.to_k.weight"
    >>> rules.weight("OUT06", name, 1.0), rules.weight("OUT06", name.replace("to_k", "to_q"), 1.0)
    (0.2, 0.5)
    """

    rules: tuple[ElementRule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ElementRules:
        """Read rules separated by commas or new lines; an empty text holds none.

        BLOCKS and ELEMENTS are words separated by spaces: names and ranges of blocks, parts of tensors'
        names. An empty field takes everything, and NOT in front turns a field round. RATIO is a number as for
        blocks, or ``skip``. Raises WeightsError that quotes the rule with the wrong part marked ``>>so<<``.
        """
        texts = [rule.strip() for rule in re.split(r"[,\n\r]", text) if rule.strip()]
        return cls(tuple(_parse_rule(rule, number) for number, rule in enumerate(texts, start=1)))

    @classmethod
    def of(cls, rules: RulesLike) -> ElementRules:
        """Return rules given as a text, as ElementRules, or as a list of either, or of single rules.

        Raises WeightsError as `parse` does, and RecipeError for anything else.
        """
        given = rules if isinstance(rules, (list, tuple)) else [rules]
        for one in given:
            if not isinstance(one, (str, ElementRule, ElementRules)):
                raise RecipeError(
                    "rules are a text, as in 'OUT03-OUT05:attn2:0.5', a list of such texts, or ElementRules; "
                    f"{type(one).__name__} given"
                )
        return cls.parse(", ".join(map(str, given)))

    def __str__(self) -> str:
        return ", ".join(map(str, self.rules))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def resolve(self, family: Family | str) -> FamilyRules:
        """Return the rules for a family's blocks.

        Raises WeightsError, quoting the rule, for a block it does not have.
        """
        wanted = family_named(family)
        return FamilyRules(
            tuple(_with_blocks(rule, number, wanted) for number, rule in enumerate(self.rules, start=1))
        )


RulesLike = str | ElementRule | ElementRules | Sequence["str | ElementRule | ElementRules"]
"""What stands for element rules: a text such as ``"OUT03-OUT05:attn2:0.8"``, `ElementRules`, or a list of
both.
"""


@dataclass(frozen=True)
class FamilyRules:
    """Element rules with the blocks that each takes."""

    rules: tuple[tuple[ElementRule, frozenset[str]], ...]

    def weight(self, block: str, name: str, otherwise: float | None) -> float | None:
        """Return the weight of a tensor: that of the last rule that takes it, or `otherwise`.

        None means `skip`.

        `name` is the tensor's name in LDM naming, whatever the model's own naming is.
        """
        rule = self._rule_of(block, name)
        return otherwise if rule is None else rule.ratio

    def counts(self, tensors: Iterable[tuple[str, str]]) -> dict[str, int]:
        """Return {rule: how many of the `tensors` have their weight from it}, of rules that any has.

        `tensors` are given as (block, LDM name).
        """
        deciding = Counter(self._rule_of(block, name) for block, name in tensors)
        return {str(rule): deciding[rule] for rule, _ in self.rules if deciding[rule]}

    def _rule_of(self, block: str, name: str) -> ElementRule | None:
        """The last rule that takes a tensor."""
        return next(
            (rule for rule, blocks in reversed(self.rules) if block in blocks and _takes(rule, name)), None
        )

    def idle(self, tensors: Iterable[tuple[str, str]]) -> list[str]:
        """Return the rules that take none of the `tensors`, given as (block, LDM name): most likely a slip of
        the pen.
        """
        known = list(tensors)
        return [
            str(rule)
            for rule, blocks in self.rules
            if not any(block in blocks and _takes(rule, name) for block, name in known)
        ]


def _takes(rule: ElementRule, name: str) -> bool:
    return rule.elements.takes(any(part in name for part in rule.elements.words))


def _parse_rule(text: str, number: int) -> ElementRule:
    fields = [" ".join(field.split()) for field in text.split(":")]
    if len(fields) != 3:
        raise _error(number, [text], 0, f"expected {_FORM}")
    # A dash belongs to a range whatever blanks people put around it.
    fields[0] = re.sub(r"\s*-\s*", "-", fields[0].upper())
    for index, field in enumerate(fields[:2]):
        words = field.upper().split()
        if words == ["NOT"]:
            raise _error(number, fields, index, "expected names after NOT")
        if "NOT" in words[1:]:
            raise _error(
                number, fields, index, "NOT stands in front of the whole field, once", words.index("NOT", 1)
            )
    skip = fields[2].casefold() == "skip"
    ratio = None if skip else finite_number(fields[2])
    if ratio is None and not skip:
        raise _error(number, fields, 2, "expected a number or skip")
    try:
        rule = ElementRule(_selection(fields[0]), _selection(fields[1]), checked_weight(ratio, "the rule"))
    except WeightsError as error:
        raise _error(number, fields, 2, str(error)) from None
    _check_blocks(rule, number)
    return rule


def _selection(field: str) -> Selection:
    words = tuple(field.split())
    return Selection(words[1:], negated=True) if words and words[0].upper() == "NOT" else Selection(words)


def _check_blocks(rule: ElementRule, number: int) -> None:
    """Raise WeightsError for a word that no family reads which reads the words before it."""
    possible = [FAMILIES[DEFAULT_FAMILY], *FAMILIES.values()]
    for word in rule.blocks.words:
        readable = [family for family in possible if may_name_blocks(word, family)]
        if not readable:
            _with_blocks(rule, number, possible[0])
        possible = readable


def _with_blocks(rule: ElementRule, number: int, family: Family) -> tuple[ElementRule, frozenset[str]]:
    named: set[str] = set()
    for index, word in enumerate(rule.blocks.words, start=int(rule.blocks.negated)):
        try:
            named.update(block_range(word, family))
        except WeightsError as error:
            raise _error(number, str(rule).split(":"), 0, str(error), index) from None
    return rule, frozenset(block for block in family.blocks if rule.blocks.takes(block in named))


def _error(number: int, fields: Sequence[str], field: int, why: str, word: int | None = None) -> WeightsError:
    """The error for a rule, quoted with a field of it, or one word of the field, marked."""
    quoted = [shown(text) for text in fields]
    words = [fields[field]] if word is None else fields[field].split(" ")
    at = word or 0
    before, wrong, after = (
        shown(" ".join(part)) for part in (words[:at], words[at : at + 1], words[at + 1 :])
    )
    quoted[field] = f"{before} >>{wrong}<< {after}".strip()
    return WeightsError(f"element rule {number}, '{':'.join(quoted)}': {why}")
