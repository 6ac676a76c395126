"""Ranges of numeric settings: a value that is no number, not finite or outside is named, with its range."""

import math
from typing import Any

SEEDS = "[0, 9223372036854775807]"  # they are hashed as 64-bit numbers


def check_ranges(section: str, config: Any, **ranges: str) -> None:
    """See that settings of a config lie in their ranges; None, where a setting may be it, is left alone.

    Args:
        section: where the settings are, for messages; empty: at the top.
        config: whatever has the settings as attributes; a list is checked entry by entry.
        ranges: an interval for each setting, such as "[0, 1]", "(0, inf)".

    Raises:
        ValueError: names the setting, its value and the range.
    """
    for name, interval in ranges.items():
        value = getattr(config, name)
        label = f"{section}.{name}" if section else name
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and not _lies_in(number, interval):
                shown = f"{label}={list(value) if isinstance(value, list | tuple) else repr(value)}"
                raise ValueError(f"{shown} {_in_words(interval)}.")


def _lies_in(number: Any, interval: str) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _in_words(interval: str) -> str:
    low, high = (end.strip() for end in interval[1:-1].split(","))
    if high == "inf":
        return f"must be a number, {low} or more" if interval[0] == "[" else f"must be a number above {low}"
    return f"must lie in {interval}"
