"""What numbers and words a setting may hold, one entry for each; errors in the config's own names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def check_ranges(config: Any, section: str, ranges: Mapping[str, str]) -> None:
    """Every named number of a config lies in its interval.

    NaN lies in none, and infinity in those alone that say `inf]`. None is no number and passes; of a list, each element
    is checked.

    Args:
        section: what stands before the names in a message, such as `optim`; empty at the top.
        ranges: name -> interval, such as `[1, inf)` or `(0, 1]`.

    Raises:
        ValueError: one does not; names key, value and what is allowed.
    """
    for name, interval in ranges.items():
        value = getattr(config, name)
        elements = value if isinstance(value, list | tuple) else [value]
        if not all(_lies_in(element, interval) for element in elements if element is not None):
            key = f"{section}.{name}" if section else name
            raise ValueError(f"{key}={value} must be {_words(interval)}{' each' if elements is value else ''}.")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError: the value is none of the choices, which the message lists."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(choices)}.")


def _ends(interval: str) -> tuple[float, float]:
    least, _, most = interval[1:-1].partition(",")
    return float(least), float(most)


def _lies_in(value: float, interval: str) -> bool:
    least, most = _ends(interval)
    above = value >= least if interval[0] == "[" else value > least
    below = value <= most if interval[-1] == "]" else value < most
    return above and below


def _words(interval: str) -> str:
    least, most = _ends(interval)
    if math.isinf(most):
        return f"{least:g} or more" if interval[0] == "[" else f"above {least:g}"
    return f"in {interval}"
