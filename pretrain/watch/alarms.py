"""Signs of a run that has stopped learning, said in plain words: what was seen, and what to do."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LINES = 3  # an alarm needs the sign in this many lines of metrics in a row: one odd batch raises nothing
_SPREAD = 0.05  # share of an even spread; a fresh ViT is above it
_UNIFORM, _CERTAIN = 0.99, 0.01  # teacher entropy as a share of ln K
_USE = 0.02  # share of the prototypes that could be used
_WAIT = 0.3  # share of the time that the device had no batch


@dataclass(frozen=True)
class Alarm:
    name: str
    message: str


def find_alarms(lines: Sequence[Mapping[str, Any]], num_prototypes: Mapping[str, int]) -> list[Alarm]:
    """Alarms that the last lines of metrics give all together.

    Args:
        lines: the last lines of metrics.jsonl, in order; fewer than three raise nothing.
        num_prototypes: head -> K, for the heads `dino` and `ibot` that there are.
    """
    return [*_collapse(lines, num_prototypes), *_wait(lines)]


def _collapse(lines: Sequence[Mapping[str, Any]], num_prototypes: Mapping[str, int]) -> list[Alarm]:
    found = _spread(lines)
    for head, prototypes in num_prototypes.items():
        found += [*_entropy(lines, head, prototypes), *_use(lines, head)]
    return found


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float] | None:
    """A figure in the last lines; None where there are too few of them, or one is without it."""
    values = [line.get(name) for line in lines[-_LINES:]]
    return None if len(values) < _LINES or None in values else values  # type: ignore[return-value]  # no None is left


def _spread(lines: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    values = _values(lines, "feature_std")
    if values is None or max(values) >= _SPREAD:
        return []
    message = (
        f"All images give almost the same feature (spread {values[-1]:.3f} of 1): the run has collapsed. Go back to a "
        "checkpoint before it, and try a lower learning rate, a lower teacher temperature, a longer warm-up, a KoLeo "
        "weight of 0.1 or more, or Sinkhorn-Knopp instead of softmax centring."
    )
    return [Alarm("collapsed_features", message)]


def _entropy(lines: Sequence[Mapping[str, Any]], head: str, prototypes: int) -> list[Alarm]:
    values = _values(lines, f"teacher_entropy/{head}")
    if values is None or prototypes < 2:
        return []
    shares = [value / math.log(prototypes) for value in values]
    if min(shares) > _UNIFORM:
        message = (
            f"The teacher's {head} targets are almost uniform over the {prototypes:,} prototypes ({values[-1]:.2f} of "
            f"{math.log(prototypes):.2f} nats): they teach nothing. Lower the teacher temperature, or use fewer "
            "prototypes or a larger batch."
        )
        return [Alarm(f"uniform_targets_{head}", message)]
    use = _values(lines, f"prototype_use/{head}")
    if max(shares) < _CERTAIN and use is not None and max(use) < 0.5:
        message = (
            f"The teacher's {head} targets are certain ({values[-1]:.3f} nats), and different images share them: a "
            "collapse is near. Raise the teacher temperature, or its warm-up."
        )
        return [Alarm(f"certain_targets_{head}", message)]
    return []


def _use(lines: Sequence[Mapping[str, Any]], head: str) -> list[Alarm]:
    values = _values(lines, f"prototype_use/{head}")
    if values is None or max(values) >= _USE:
        return []
    message = (
        f"Only {100 * values[-1]:.1f}% of the {head} prototypes that a batch could use are used: most have died. Use "
        "fewer prototypes, a larger batch, Sinkhorn-Knopp, or a longer freeze of the last layer."
    )
    return [Alarm(f"dead_prototypes_{head}", message)]


def _wait(lines: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    values = _values(lines, "data_wait")
    if values is None or min(values) < _WAIT:
        return []
    message = (
        f"{100 * values[-1]:.0f}% of the time goes to waiting for data: use more loader workers, a longer prefetch, "
        "smaller source images, or shards nearer to the machine."
    )
    return [Alarm("waiting_for_data", message)]


class AlarmWatch:
    """Looks at each new line of metrics and gives the alarms that were not there at the line before.

    Args:
        num_prototypes: head -> K. A head whose loss is off has no figures, and so no alarm.
        start_step: steps of the run before this phase.
        warmup_steps, num_steps: of the phase. While it warms up the signs of collapse are normal, and nothing is said
            of them; but for half of the phase at most, so that no setting silences them throughout.
    """

    def __init__(
        self, num_prototypes: Mapping[str, int], start_step: int = 0, warmup_steps: int = 0, num_steps: int = 0
    ) -> None:
        self._num_prototypes = num_prototypes
        self._grace_steps = start_step + min(warmup_steps, num_steps // 2)
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=_LINES)
        self._raised: set[str] = set()

    def look(self, line: Mapping[str, Any]) -> list[Alarm]:
        self._lines.append(line)
        warmed_up = [line for line in self._lines if line["step"] > self._grace_steps]
        found = [*_collapse(warmed_up, self._num_prototypes), *_wait(list(self._lines))]
        new = [alarm for alarm in found if alarm.name not in self._raised]
        self._raised = {alarm.name for alarm in found}
        return new
