"""Numbers and settings as the plan says them."""

from collections.abc import Sequence
from typing import Any

from curation.encoders.encoder import View
from curation.planning.costs import EncoderCost
from curation.reading.seeds import RetrievalRule


def encoder_words(spec: str, view: View, cost: EncoderCost) -> str:
    """An encoder, its view and what it costs."""
    seen = f"{view.width} x {view.height} px -> {cost.dim}-d"
    if not cost.is_torch:
        return f"{spec} ({seen})"
    return f"{spec} ({seen}, {cost.parameters / 1e6:,.0f} M parameters, {flop(cost.flop)} an image)"


def filter_words(filters: Sequence[Any]) -> str:
    """What filters reject by."""
    return "rejects by " + ", ".join(str(f.get("kind", f)) for f in filters) if filters else "nothing"


def rule_words(rule: RetrievalRule, drawn: int) -> str:
    """How a seed set draws."""
    if rule.mode == "sample":
        return f"the {rule.k} nearest of each seed image, collisions: {rule.collisions}; at most {drawn:,}"
    if rule.mode == "cluster":
        cluster = f"each cluster with {rule.min_hits} seed images or more"
        return f"up to {rule.images_per_cluster:,} from {cluster}; at most {drawn:,}"
    return "nothing: the set is only included as it is"


def numbers(values: Sequence[int]) -> str:
    """Counts, the first level first."""
    return " / ".join(f"{value:,}" for value in values)


def size(value: float) -> str:
    """Bytes."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def flop(value: float) -> str:
    """Operations; nothing where there are none."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")) if value else ""


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} {units[-1]}"


def time_words(seconds: float) -> str:
    """Seconds, minutes or hours, of a clock or of a core; nothing where it is less than a tenth of a second."""
    if seconds < 0.1:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 3600:,.0f} h"
