"""What numbers and words a setting may hold, one entry for each; errors in the config's own names."""

import math
from collections.abc import Sequence
from typing import Any

SEEDS = "[0, 9223372036854775807]"  # they are hashed as 64-bit numbers


def check_ranges(section: str, config: Any, **ranges: str) -> None:
    """Every named number of a config lies in its interval.

    What is no number lies in none, nor NaN; infinity lies in those alone that say `inf]`. None passes; of a list, each
    element is checked.

    Args:
        section: what stands before the names in a message, such as `optim`; empty at the top.
        config: whatever has the settings as attributes.
        ranges: an interval for each setting, such as `[1, inf)` or `(0, 1]`.

    Raises:
        ValueError: one does not; names key, value and what is allowed.
    """
    for name, interval in ranges.items():
        value = getattr(config, name)
        elements = value if isinstance(value, list | tuple) else [value]
        if not all(_lies_in(element, interval) for element in elements if element is not None):
            key = f"{section}.{name}" if section else name
            raise ValueError(f"{key}={value!r} must be {_words(interval)}{' each' if elements is value else ''}.")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError: the value is none of the choices, which the message lists."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(choices)}.")


def _ends(interval: str) -> tuple[float, float]:
    least, _, most = interval[1:-1].partition(",")
    return float(least), float(most)


def _lies_in(value: Any, interval: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    least, most = _ends(interval)
    above = value >= least if interval[0] == "[" else value > least
    below = value <= most if interval[-1] == "]" else value < most
    return above and below


def _words(interval: str) -> str:
    least, most = _ends(interval)
    if math.isinf(most):
        return f"{least:g} or more" if interval[0] == "[" else f"above {least:g}"
    return f"in {interval}"
