"""How tokens and numbers are shown: nothing invisible in a text, three digits of a number."""

from __future__ import annotations

import functools
import math
import unicodedata

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "⟨CR⟩", "\0": "⟨NUL⟩"}


@functools.lru_cache(maxsize=1 << 17)
def visible(text: str) -> str:
    """The text with a sign in place of every character that has no ink, or that changes the order of others.

    ↵ for a newline, ⇥ for a tab, ⍽ for spaces that are not U+0020, ⟨NUL⟩, ⟨CR⟩, ⟨U+202E⟩ and so on for the others.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_sign, text))


def token(text: str) -> str:
    """A token standing alone: its spaces are visible too."""
    return visible(text).replace(" ", "␣") or "∅"


def prose(text: str) -> str:
    """Somebody's own words: lines stay lines, all else as in `visible`."""
    return "\n".join(visible(line) for line in text.splitlines())


def number(value: float | int | None, digits: int = 3) -> str:
    """The number in `digits` significant digits, thousands apart; – for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−")
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if 0 <= places <= 6:
        return f"{value:.{places}f}".replace("-", "−")
    return (f"{value:,.0f}" if 0 > places > -6 else f"{value:.{digits - 1}e}").replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """The number with its sign, + too."""
    return number(value, digits) if value is None or not value > 0 else f"+{number(value, digits)}"


def digits_of(low: float, high: float) -> int:
    """How many digits an interval and what is in it are shown with: 3, up to 7 where 3 make its ends alike."""
    return next((n for n in range(3, 7) if low == high or f"{low:.{n}g}" != f"{high:.{n}g}"), 7)


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return number(share) if share is None or math.isnan(share) else f"{number(100 * share)}%"


def _sign(character: str) -> str:
    if named := _NAMED.get(character):
        return named
    kind = unicodedata.category(character)
    if kind == "Zs":
        return " " if character == " " else "⍽"
    return f"⟨U+{ord(character):04X}⟩" if kind[0] == "C" or kind in ("Zl", "Zp") else character
