"""Where the zeros begin with which a file ends, found by looking at a few pages.

A download takes the file's whole space first, and one that is broken off leaves zeros from where it had got
to.
"""

from __future__ import annotations

from typing import BinaryIO

from blockmerge.errors import shown

_PAGE = 4096
_SAMPLES = 16
_ROUNDS = 32  # of files with zeros here and there; each begins further behind


def zeros_from(file: BinaryIO, start: int, end: int) -> int:
    """Return from which byte on [start, end) of a file holds nothing but zeros; `end` where its last page
    holds anything else.

    A file that ends in anything is told by one page. For others the place is found by halving, and then pages
    spread over all that follows must be zeros too.
    """
    pages = -(-(end - start) // _PAGE)

    def held_by(number: int) -> bytes:
        """What a page holds before its zeros."""
        file.seek(start + number * _PAGE)
        return file.read(min(_PAGE, end - start - number * _PAGE)).rstrip(b"\0")

    low, last = -1, pages - 1  # the last page known to hold something, and the last of all
    if pages < 1 or held_by(last):
        return end
    for _ in range(_ROUNDS):
        high = last
        while high - low > 1:
            middle = (low + high) // 2
            if held_by(middle):
                low = middle
            else:
                high = middle
        samples = {high + (last - high) * number // _SAMPLES for number in range(1, _SAMPLES)}
        held = next((number for number in sorted(samples, reverse=True) if held_by(number)), None)
        if held is None:
            return start if low < 0 else start + low * _PAGE + len(held_by(low))
        low = held
    return end


def said_of_zeros(name: str, begin: int, size: int) -> str:
    """What messages say of a file of `size` bytes that holds nothing but zeros from byte `begin` on."""
    return (
        f"{shown(name)} is broken off: it holds nothing but zeros after {begin:,} of {size:,} bytes, "
        "as a download leaves that did not finish; download it again"
    )
