"""How a run goes on from its last checkpoint: what has to be the same, what has moved, what was changed on purpose.

Only phases that have begun are compared; later ones may be corrected, renamed or dropped. Images are compared by the
fingerprints of their tables, a teacher to distil from by the hash of its weights, so both may move. What differs
otherwise is an error, unless `--allow-changed` names it.
"""

import difflib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.loader import merge_config
from pretrain.checkpoint import MANIFEST, PREFIX, Checkpoints, read_manifest
from pretrain.config import TrainConfig
from pretrain.data.loader import read_tables
from pretrain.data.shards import ImageTable
from pretrain.distributed.tensor_files import DamagedFile
from pretrain.settings import RUN_SETTINGS
from pretrain.watch.lines import read_lines
from pretrain.watch.metrics import CHANGES
from pretrain.weight_files import BACKBONE, HEADS
from pretrain.weights import Weights

# How a run is computed and watched, not what is computed.
_FREE = ("execution", "checkpoint", "evaluation", "watch", "phases", "optim.max_skipped_steps")
# Read when a phase starts, and not again.
_READ_ONCE = ("init_from", "gram.teacher", "reset_optimizer", "start_from")
log = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Position:
    """Where a run stands: so many steps of this phase, and of all phases, are done."""

    phase: int = 0
    step: int = 0
    global_step: int = 0

    def next_step(self) -> "Position":
        return Position(self.phase, self.step + 1, self.global_step + 1)

    def next_phase(self) -> "Position":
        return Position(self.phase + 1, 0, self.global_step)


@dataclass(frozen=True)
class Standing:
    """What a run goes on from."""

    position: Position = Position()
    latest: Path | None = None
    """its last checkpoint"""
    images: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """phase -> dataset -> fingerprint, of the phases that have begun"""
    distilled: str | None = None
    """hash of the teacher that the phase in progress distils from"""
    changes: Sequence[Mapping[str, Any]] = ()
    """what was changed on the way: step, phase, key, from, to"""


def find_standing(config: TrainConfig, checkpoints: Checkpoints, allowed: Sequence[str] = ()) -> Standing:
    """Where the run folder's last checkpoint stands; the start, without one.

    Args:
        allowed: keys or sections whose change is meant, such as `optim.base_lr` or `phases.NAME.optim`.

    Raises:
        ValueError: that checkpoint is damaged, or was trained with other settings than are asked for.
    """
    check_allowed(config, allowed)
    if (damaged := checkpoints.without_manifest()) is not None:  # a name is given last: something took the manifest
        raise ValueError(f"{damaged} is damaged: it has no {MANIFEST}. {checkpoints.without(damaged)}")
    latest = checkpoints.latest()
    if latest is None:
        return Standing()
    try:
        meta = read_manifest(latest)["meta"]
    except DamagedFile as error:
        raise ValueError(f"{error} {checkpoints.without(latest)}") from None
    # A setting that an older version did not have is taken at its default.
    found = merge_config(TrainConfig(), meta["config"], f"{latest}")
    position = Position(**meta["position"])
    changes = [*meta.get("changes", ()), *_compare(config, found, position, latest, allowed)]
    name = config.phase_names[position.phase]
    steps = config.phase(name).steps
    if position.step > steps:
        raise ValueError(f"phase {name}: steps={steps}, and {position.step} are done already; give that or more.")
    images = meta["data"]
    if all(isinstance(value, str) for value in images.values()):  # an older version: one set of tables for all
        images = {meta["phase"]: images}
    return Standing(
        position=position.next_phase() if position.step == steps else position,
        latest=latest,
        images=images,
        distilled=meta.get("distilled"),
        changes=changes,
    )


def saved_position(config: TrainConfig, out: Path | None) -> Position:
    """Where a run folder that is only looked at stands; the start, without one or with other phases in it."""
    whole = sorted(out.glob(f"checkpoints/{PREFIX}*/{MANIFEST}")) if out else []
    if not whole:
        return Position()
    meta = read_manifest(whole[-1].parent)["meta"]
    position = Position(**meta["position"])
    if meta["phase"] != dict(enumerate(config.phase_names)).get(position.phase):
        return Position()
    finished = position.step == config.phase(meta["phase"]).steps
    return position.next_phase() if finished else position


def compare_images(
    config: TrainConfig, standing: Standing, tables: Sequence[Mapping[str, ImageTable]], allowed: Sequence[str]
) -> Standing:
    """Compare the images of the phases that have begun; a change that is allowed joins the standing's.

    Those of a phase that is over are looked at where another place is named for them, and may be gone.

    Args:
        tables: of each phase; {} of those that are over.

    Raises:
        ValueError: they are others than before, or the same in another order.
    """
    position = standing.position
    moved = {change["phase"] for change in standing.changes if change["key"].endswith(".shards")}
    changes = list(standing.changes)
    for index, name in enumerate(config.phase_names[: position.phase + (position.step > 0)]):
        now: Mapping[str, ImageTable] = tables[index] if index == position.phase else {}
        if index < position.phase and name in moved:
            with suppress(ValueError):
                now = read_tables(config.phase(name).data)
        before, found = standing.images.get(name, {}), {key: table.fingerprint() for key, table in now.items()}
        if not found or list(before.values()) == list(found.values()):
            continue
        pairs = zip(found, [*before.values(), *[None] * len(found)], strict=False)
        changed = next((key for key, former in pairs if found[key] != former), next(iter(found)))
        key = f"data.datasets.{changed}.shards"
        if not _is_allowed(key, name, allowed):
            raise ValueError(
                f"{standing.latest} was trained on other images: data.datasets.{changed} has changed (names, sizes or "
                "order of its shards and images). Name the former shards, wherever they lie now; give another --out; "
                f"or, to go on with these, --allow-changed {key}."
            )
        changes.append(_change(position, name, key, before.get(changed), found[changed]))
    return replace(standing, changes=changes)


def write_changes(out: Path, standing: Standing) -> None:
    """changes.jsonl: every setting that was changed on the way; and a line for each that is new."""
    path = out / CHANGES
    if standing.changes:
        known = read_lines(path)
        for change in standing.changes:
            if change not in known:
                log.info("%s: %s was %s, now %s", change["phase"], change["key"], change["from"], change["to"])
        path.write_text("".join(json.dumps(change) + "\n" for change in standing.changes), encoding="utf-8")
    elif path.exists():
        path.unlink()


def check_allowed(config: TrainConfig, allowed: Iterable[str]) -> None:
    """Raises ValueError: a key that no phase has."""
    known = set(_sections(asdict(config)))
    for name in config.phase_names:
        inside = list(_sections(asdict(config.phase(name))))
        known |= {f"phases.{name}", *inside, *(f"phases.{name}.{key}" for key in inside)}
    for key in allowed:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"--allow-changed {key}: no setting or section has that name, such as optim.base_lr.{hint}"
            )


def weights_hash(weights: Weights, network: nn.Module) -> str:
    """32 hex digits over names, shapes and float32 bytes of a network's tensors, one of which is in memory at a time.

    Args:
        network: that these are the weights of, for its names; its own values are not looked at.
    """
    digest = hashlib.sha256()
    stored = weights.stored((BACKBONE, *HEADS))
    for name in network.state_dict():
        tensor = stored[name].read().float().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def check_distilled(config: TrainConfig, found: str, standing: Standing, allowed: Sequence[str]) -> None:
    """Raises ValueError: the phase in progress distilled from another teacher (`found`: the hash of the one now)."""
    position = standing.position
    name = config.phase_names[position.phase]
    if position.step and standing.distilled not in (None, found) and not _is_allowed("distill_from", name, allowed):
        raise ValueError(
            f"phase {name}: distill_from={config.phase(name).distill_from} is another teacher than before: give the "
            "former one, wherever it lies now, or --allow-changed distill_from."
        )


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"base_lr": 1}} -> {"optim.base_lr": 1}."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _sections(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key and every section."""
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _sections(value, f"{prefix}{key}.")


def _compare(
    config: TrainConfig, found: TrainConfig, position: Position, latest: Path, allowed: Sequence[str]
) -> list[dict[str, Any]]:
    """What differs in the phases that have begun, all of it allowed.

    Raises:
        ValueError: something that is not.
    """
    begun = found.phase_names[: position.phase + 1]
    asked = config.phase_names[: position.phase + 1]
    if begun != asked:
        raise ValueError(
            f"{latest} stands in phase {begun[-1]} (phases {', '.join(begun)}), and now the first phases are "
            f"{', '.join(asked)}: phases that have begun keep their names and order. Give another --out, and "
            f"init_from={latest} to start from its teacher."
        )
    changes: list[dict[str, Any]] = []
    refused: list[str] = []
    for index, name in enumerate(begun):
        now = config.phase(name)
        was, now = _compared(_with_names_of(now, found.phase(name))), _compared(now)
        for key in sorted(was.keys() | now.keys()):
            old, new = was.get(key), now.get(key)
            if old == new:
                continue
            if fixed := _why_fixed(key, old, new, is_over=index < position.phase):
                of_shape = key.startswith(("model.", "heads."))  # what is there may not fit
                start = "" if of_shape else f" (and init_from={latest} to start from its teacher)"
                raise ValueError(
                    f"{latest} was trained with {key}={old}, and now {key}={new} is asked for: {fixed}. Give another "
                    f"--out{start}, or the former setting."
                )
            moved = key in _READ_ONCE or key.endswith(".shards")
            moved = moved or (key == "distill_from" and bool(old) == bool(new))
            if not moved and not _is_allowed(key, name, allowed):
                refused.append(f"{key}={old}, and now {key}={new}")
            changes.append(_change(position, name, key, old, new))
    if refused:
        key = refused[0].partition("=")[0]
        raise ValueError(
            f"{latest} was trained with {refused[0]} is asked for"
            + (f" (and {len(refused) - 1} more such)" if len(refused) > 1 else "")
            + f": give the former setting; --allow-changed {key} to go on with the new one; or another --out (and "
            f"init_from={latest} to start from its teacher)."
        )
    return changes


def _change(position: Position, phase: str, key: str, old: Any, new: Any) -> dict[str, Any]:
    return {"step": position.global_step, "phase": phase, "key": key, "from": old, "to": new}


def _with_names_of(phase: TrainConfig, found: TrainConfig) -> TrainConfig:
    """`found` with its datasets named as in `phase`: `--data` names them by path, and only their order counts."""
    before, now = found.data.datasets, phase.data.datasets
    if len(before) != len(now):
        return found
    names = dict(zip(before, now, strict=True))
    datasets = {names[name]: dataset for name, dataset in before.items()}
    return replace(
        found, data=replace(found.data, datasets=datasets, homogeneous=names.get(found.data.homogeneous, ""))
    )


def _compared(phase: TrainConfig) -> dict[str, Any]:
    """The settings that the phase's results depend on."""
    values = flat(asdict(phase))
    return {
        key: value
        for key, value in values.items()
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    }


def _why_fixed(key: str, old: Any, new: Any, is_over: bool) -> str:
    """Why no --allow-changed lets a setting of a phase that has begun differ; empty: it may."""
    section, _, name = key.partition(".")
    if section == "heads" or (section == "model" and name not in RUN_SETTINGS):
        return "the weights are what it made them"
    if is_over and key == "steps":
        return "that phase is over"
    if key in ("loss.dino_weight", "loss.ibot_weight", "masks.probability") and bool(old) != bool(new):
        return "a head has moments where its term is on, and none where it is off; add a phase for the other"
    if key == "gram.weight" and not old:
        return "the phase began without a Gram teacher; add a phase that has one"
    if key == "loss.objective":
        return "the heads' weights are what it made them"
    if key == "loss.centering":
        return "the phase began with another kind of state; add a phase for the other centring"
    return ""


def _is_allowed(key: str, phase: str, allowed: Iterable[str]) -> bool:
    names = (key, f"phases.{phase}.{key}")
    return any(name == each or name.startswith(f"{each}.") for name in names for each in allowed)
