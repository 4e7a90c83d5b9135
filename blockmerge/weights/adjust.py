"""`Adjust`: detail, contrast, brightness and colour tone, set at the first and last layers of the U-Net after
a merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

from blockmerge.anatomy import UNET_PREFIX, Family
from blockmerge.errors import RecipeError, WeightsError, counted, shown
from blockmerge.weights.block_lists import family_named
from blockmerge.weights.plain_numbers import finite_number

_NAMES = "IN,OUT,OUT2,CONT,BRI,COL1,COL2,COL3"


class Change(NamedTuple):
    """What is done to a merged tensor: times `scale`, then plus `shift`, one number for each entry of its
    only axis.
    """

    scale: float = 1.0
    shift: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Adjust:
    """SuperMerger's eight numbers; 0 changes nothing, and about −5 to 5 is usual.

    `into`, `out` and `out2` add detail (and noise), `contrast` contrast, `brightness` brightness, and the
    colours go from cyan to red, magenta to green, yellow to blue.
    """

    into: float = 0.0
    out: float = 0.0
    out2: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    red: float = 0.0
    green: float = 0.0
    blue: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Adjust:
        """Read ``IN,OUT,OUT2,CONT,BRI,COL1,COL2,COL3``; numbers left out at the end are 0, as in SuperMerger.

        Raises WeightsError for what is no number, and for more than eight.
        """
        words = [word.strip() for word in text.split(",")] if text.strip() else []
        if len(words) > 8:
            raise WeightsError(
                f"adjust '{shown(text)}': {counted(len(words), 'number')} given; there are eight: {_NAMES}"
            )
        numbers = []
        for name, word in zip(_NAMES.split(","), words, strict=False):
            number = finite_number(word)
            if number is None:
                raise WeightsError(
                    f"adjust '{shown(text)}': {name} is '{shown(word)}', which is not a number ({_NAMES})"
                )
            numbers.append(number)
        return cls(*numbers)

    def __post_init__(self) -> None:
        for field, name in zip(fields(self), _NAMES.split(","), strict=True):
            number = getattr(self, field.name)
            found = None if isinstance(number, str) else finite_number(str(number))
            if found is None:
                raise WeightsError(f"adjust: {name} is '{shown(number)}', which is not a number ({_NAMES})")
            object.__setattr__(self, field.name, found)

    @classmethod
    def of(cls, adjust: AdjustLike) -> Adjust:
        """Return eight numbers given as a text, as a list (NumPy's too), or as an Adjust.

        Raises WeightsError as `parse` does, and RecipeError for anything else.
        """
        if isinstance(adjust, Adjust):
            return adjust
        numbers = adjust.tolist() if hasattr(adjust, "tolist") else adjust
        if isinstance(numbers, (list, tuple)):
            return cls.parse(",".join(map(str, numbers)))
        if not isinstance(numbers, str):
            raise RecipeError(
                "adjust is eight numbers, as in '0,0,0,1' or [0, 0, 0, 1], or an Adjust; "
                f"{type(adjust).__name__} given"
            )
        return cls.parse(numbers)

    def __str__(self) -> str:
        return ",".join(repr(number + 0.0).removesuffix(".0") for number in astuple(self))

    def __bool__(self) -> bool:
        return any(astuple(self))

    def for_tensor(self, name: str, family: Family | str) -> Change | None:
        """Return what is done to a tensor, or None when nothing is.

        `name` is its name in LDM naming. The shift of `out.2.bias` has four numbers, as the tensor has. Which
        tensors and by which formulas is the family's own (`[adjusted]` of the family's `family.toml`):
        SuperMerger's, weights × (1 − n/100) and biases × (1 + n/50); SD2 has the colours of SD1.
        """
        adjusted = family_named(family).adjusted.get(name.removeprefix(UNET_PREFIX))
        if adjusted is None:
            return None
        if adjusted.tones:
            shift = tuple(0.02 * value for value in (self.contrast, *self._colours(adjusted.tones)))
            change = Change(shift=shift if any(shift) else None)
        else:
            change = Change(1 + adjusted.factor * getattr(self, adjusted.number))
        return None if change == Change() else change

    def _colours(self, tones: Sequence[Sequence[float]]) -> Iterator[float]:
        """What brightness and colours come to in each channel; `tones` has a row for each of the four."""
        amounts = (self.brightness, self.red, self.green, self.blue)
        for channel in zip(*tones, strict=True):
            yield sum(amount * tone for amount, tone in zip(amounts, channel, strict=True))


AdjustLike = str | Sequence[float] | Adjust
"""What stands for `adjust`: a text such as ``"0,0,0,1"``, a list of up to eight numbers, or an `Adjust`."""
