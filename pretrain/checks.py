"""What can be known to be wrong with a run before its first step, in one sentence each that names phase and key.

`check_numbers` needs nothing but the config; `check_run` builds every phase's network on `meta` and looks at what the
phases will read: shards, labelled sets, the teachers that they start from, distil or anchor to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from pretrain.checkpoint import PREFIX
from pretrain.config import TrainConfig
from pretrain.data.loader import check_sizes, read_tables
from pretrain.data.shards import ImageTable
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import ranks_of_a_copy
from pretrain.models.architectures import ARCHITECTURES, architecture
from pretrain.network_weights import check_distillation, fill_teacher, load_network, teacher_weights
from pretrain.resume import Position, saved_position
from pretrain.settings import RUN_SETTINGS, HeadConfig, ModelConfig
from pretrain.student_teacher import Network, build_network, freeze_unused
from pretrain.watch.evaluation import check_sets

# Of model and heads, what a phase may change although it goes on with the weights of the one before.
_FREE_MODEL = ("position_px", *RUN_SETTINGS)
_FREE_HEAD = ("train_lengths",)
_ROPE = ("rope_shift", "rope_jitter", "rope_rescale")
Tables = dict[str, ImageTable]


def check_run(
    config: TrainConfig, world_size: int, out: Path | None = None, position: Position | None = None
) -> list[Tables]:
    """Check every phase that is still to run, and list its images.

    Args:
        out: the run folder, whose later checkpoints may be named as Gram teachers.
        position: where the run stands, by default where the run folder does; what lies behind it is not looked at.

    Returns:
        For each phase its tables, shared between phases that draw from the same shards; {} for one that is finished or
        names no dataset.

    Raises:
        ValueError: what is wrong, with its phase and key.
    """
    position = position or saved_position(config, out)
    check_numbers(config, world_size)
    phases = [(name, config.phase(name)) for name in config.phase_names]
    networks: list[Network] = []
    for name, phase in phases:
        with _of_phase(name), torch.device("meta"):
            networks.append(build_network(phase))
            freeze_unused(networks[-1], phase)
    for (name, phase), (former, network) in zip(phases[1:], pairwise(networks), strict=True):
        if not phase.reset_optimizer:
            with _of_phase(name):
                _check_moments(former, network)
    known: dict[tuple, ImageTable] = {}
    tables: list[Tables] = []
    for index, (name, phase) in enumerate(phases):
        with _of_phase(name):
            tables.append(_read_tables(phase, known) if index >= position.phase else {})
    for index, (name, phase) in enumerate(phases):
        begun = index == position.phase and position.step > 0
        if index >= position.phase:
            with _of_phase(name):
                starts_from = phase.init_from if position == Position() and index == 0 else ""
                anchored_to = "" if begun or not phase.gram.weight else phase.gram.teacher
                is_start = position.global_step == 0
                collectives.from_rank_zero(
                    lambda: _check_files(config, index, phase, starts_from, anchored_to, out, is_start)  # noqa: B023
                )
    return tables


def check_numbers(config: TrainConfig, world_size: int) -> None:
    """Raises ValueError: settings of a phase that do not fit each other, or these ranks."""
    phases = [(name, config.phase(name)) for name in config.phase_names]
    ranks_of_a_copy(config.execution.parallel, config.execution.shard_ranks, world_size)
    for (_, before), (name, phase) in pairwise(phases):
        with _of_phase(name):
            _check_goes_on(before, phase)
    for name, phase in phases:
        with _of_phase(name):
            _check_batch(phase, world_size)
            check_sizes(phase.crops, phase.patch_size)
            _check_positions(phase.model)
            _check_schedule(phase)
            _check_gram(phase)
            _check_deterministic(phase)


def idle_settings(config: TrainConfig) -> list[str]:
    """Settings that name something which then does nothing, a sentence each."""
    lines = []
    for name in config.phase_names:
        phase = config.phase(name)
        if not phase.evaluation.every_steps and (phase.evaluation.train or phase.evaluation.val):
            lines.append(f"phase {name}: evaluation.train and val do nothing while evaluation.every_steps=0")
        if not phase.gram.weight and phase.gram.teacher != "ema":
            lines.append(f"phase {name}: gram.teacher does nothing while gram.weight=0")
        if not phase.gram.weight and phase.gram.ramp_steps:
            lines.append(f"phase {name}: gram.ramp_steps does nothing while gram.weight=0")
        if phase.loss.dino_local_weight == 1 and phase.loss.dino_local_ramp_steps:
            lines.append(f"phase {name}: loss.dino_local_ramp_steps does nothing while loss.dino_local_weight=1")
        if phase.crops.drop_local_remainder and not any(s.local_px % phase.patch_size for s in phase.crops.all_sizes()):
            lines.append(f"phase {name}: crops.drop_local_remainder does nothing where the patch divides local crops")
    if config.execution.shard_ranks and config.execution.parallel != "hybrid":
        lines.append(f"execution.shard_ranks does nothing with execution.parallel={config.execution.parallel}")
    if config.start_from != "student" and len(config.phase_names) == 1:
        lines.append(f"start_from={config.start_from} does nothing in a run of one phase")
    return lines


@contextmanager
def _of_phase(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"phase {name}: {error}") from None


def _check_positions(model: ModelConfig) -> None:
    model.changes()
    learned = ARCHITECTURES[model.architecture]["position"] == "learned"
    for key in _ROPE if learned else ("position_px",):
        if getattr(model, key) is not None:
            kind = "a learned position table" if learned else "rotary positions"
            raise ValueError(f"model.{key}={getattr(model, key)} does nothing: {model.architecture} has {kind}.")


def _check_batch(config: TrainConfig, world_size: int) -> None:
    ranks = world_size * config.execution.accumulation_steps
    if config.global_batch_size % ranks:
        below = config.global_batch_size // ranks * ranks
        nearest = f"{below} and {below + ranks}" if below else f"{ranks}"
        raise ValueError(
            f"global_batch_size={config.global_batch_size} does not split over {world_size} ranks of "
            f"{config.execution.accumulation_steps} micro-batches; the nearest that do are {nearest}."
        )
    images = config.global_batch_size // ranks
    loss = config.loss
    if loss.koleo_weight and not loss.koleo_group_size and images < 2:
        raise ValueError(
            f"KoLeo needs two images to have a neighbour, found {images} in a micro-batch; raise global_batch_size, "
            "set loss.koleo_group_size, or loss.koleo_weight=0."
        )
    group, at_once = loss.koleo_group_size, images * world_size
    if group and (group < 2 or at_once % group or (group % images and images % group)):
        raise ValueError(
            f"loss.koleo_group_size={group} must be 2 or more and either divide the {images} images of a micro-batch, "
            f"or be a multiple of them that divides the {at_once} that all ranks have at once; 0 is the micro-batch."
        )
    if group > images and world_size % (group // images):
        raise ValueError(
            f"loss.koleo_group_size={group} takes the micro-batches of {group // images} ranks, {images} images each; "
            f"{world_size} ranks do not split so."
        )


def _check_schedule(config: TrainConfig) -> None:
    """The rate reaches its peak within the phase, the prototypes move in it, and something is learned."""
    loss = config.loss
    config.optim.check_steps(config.steps)
    ramps = {"loss.dino_local_ramp_steps": loss.dino_local_ramp_steps, "gram.ramp_steps": config.gram.ramp_steps}
    for key, ramp in ramps.items():
        if ramp > config.steps:
            raise ValueError(
                f"{key}={ramp}: longer than the phase, steps={config.steps}, so that the weight would never come; set "
                f"it to that or less (0: none), for example {key}={config.steps // 10}."
            )
    if not (config.uses_dino or config.uses_ibot or loss.koleo_weight or config.gram.weight):
        raise ValueError(
            "nothing is learned, for every term of the loss is off; set loss.dino_weight, or loss.ibot_weight with "
            "masks.probability and masks.ratio above 0."
        )


def _check_deterministic(config: TrainConfig) -> None:
    attention = config.model.attention
    if config.execution.deterministic and attention != "sdpa":
        raise ValueError(
            f"execution.deterministic=true, but gradients of model.attention={attention} are not known to be added up "
            "in a fixed order; use model.attention=sdpa, or leave execution.deterministic out."
        )


def _check_gram(config: TrainConfig) -> None:
    if config.gram.weight and not config.crops.all_sizes()[0].gram_px:
        raise ValueError(f"gram.weight={config.gram.weight} needs crops.gram_px, the Gram teacher's crop.")
    if config.gram.weight and config.distill_from:
        raise ValueError("gram.weight and distill_from together are not a published recipe; choose one.")


def _check_goes_on(before: TrainConfig, config: TrainConfig) -> None:
    """A phase takes over the weights of the one before it."""
    found, asked = (architecture(c.model.architecture, **c.model.changes()) for c in (before, config))
    keys = [field.name for field in fields(ModelConfig) if field.name not in _FREE_MODEL]
    for key in keys:
        was, now = (before.model.architecture, config.model.architecture) if key == "architecture" else (
            found.get(key), asked.get(key)
        )  # fmt: skip
        if was != now:
            why = "which is its value before the first step" if key == "layerscale" else "whose weights it goes on with"
            raise ValueError(
                f"model.{key}={now} differs from {was} of the phase before, {why}; of model a phase may change "
                f"{', '.join(_FREE_MODEL)}."
            )
    if before.loss.objective != config.loss.objective:
        raise ValueError(
            f"loss.objective={config.loss.objective} differs from {before.loss.objective} of the phase before, whose "
            "heads it goes on with."
        )
    if before.heads.tied != config.heads.tied:
        raise ValueError(f"heads.tied={config.heads.tied} differs from the phase before, whose heads it goes on with.")
    for head in ("dino", "ibot"):
        for key in [field.name for field in fields(HeadConfig) if field.name not in _FREE_HEAD]:
            was, now = (getattr(getattr(c.heads, head), key) for c in (before, config))
            if was != now:
                raise ValueError(
                    f"heads.{head}.{key}={now} differs from {was} of the phase before, whose heads it goes on with."
                )


def _check_moments(former: Network, network: Network) -> None:
    """A phase that keeps the optimizer of the one before it trains the same parameters."""
    moments, parameters = _trained(former), _trained(network)
    for name in sorted(moments.keys() | parameters.keys()):
        if moments.get(name) != parameters.get(name):
            raise ValueError(
                f"reset_optimizer=false keeps the moments of the phase before, and {name} is "
                f"{moments.get(name, 'not trained')} there and {parameters.get(name, 'not trained')} here; set "
                "reset_optimizer=true, or leave model.position_px, heads.*.train_lengths and which terms the loss has "
                "as they were."
            )


def _trained(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in network.named_parameters() if p.requires_grad}


def _read_tables(config: TrainConfig, known: dict[tuple, ImageTable]) -> Tables:
    """The tables of a phase; one that another phase has is listed once."""
    data, tables = config.data, {}
    for name, dataset in data.datasets.items():
        key = (dataset.shards, data.limits)
        if key not in known:
            alone = replace(data, datasets={name: dataset}, homogeneous="", homogeneous_share=0.0)
            known[key] = read_tables(alone)[name]
        tables[name] = known[key]
        if len(tables[name]) < config.global_batch_size:
            raise ValueError(
                f"data.datasets.{name} has {len(tables[name])} images, fewer than "
                f"global_batch_size={config.global_batch_size}: lower the batch, or name more shards."
            )
    return tables


def _check_files(
    config: TrainConfig,
    index: int,
    phase: TrainConfig,
    starts_from: str,
    anchored_to: str,
    out: Path | None,
    is_start: bool,
) -> None:
    if phase.evaluation.every_steps and is_start:  # later a set that went missing costs its figures, and no more
        check_sets(phase.evaluation)
    if starts_from:
        with _of_key("init_from"):
            load_network(_on_meta(phase), starts_from)
    if phase.distill_from:
        with _of_key("distill_from"):
            weights, teacher = teacher_weights(phase.distill_from)
            check_distillation(teacher, phase)
            fill_teacher(teacher, weights)
    if anchored_to not in ("", "ema"):
        run = out or Path("OUT")  # a plan may have none
        source = phase.gram.source(run / "checkpoints")
        if not _will_be_saved(source, config, index, out if source == anchored_to else run):
            with _of_key("gram.teacher"):
                load_network(_on_meta(phase), source)


def _on_meta(config: TrainConfig) -> Network:
    """What a file is compared with, without room for it."""
    with torch.device("meta"):
        return build_network(config)


@contextmanager
def _of_key(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if key in text else f"{key}: {text}") from None


def _will_be_saved(source: str, config: TrainConfig, index: int, out: Path | None) -> bool:
    """Whether a path is a checkpoint that this run itself will have when phase `index` starts.

    Raises:
        ValueError: it lies among this run's checkpoints, and will not be there.
    """
    path = Path(source)
    if path.exists() or out is None or path.parent.resolve() != (out / "checkpoints").resolve():
        return False
    ends: list[int] = []
    for name in config.phase_names[:index]:
        ends.append((ends[-1] if ends else 0) + config.phase(name).steps)
    kept = kept_steps(config, ends)
    number = path.name.removeprefix(PREFIX)
    if not number.isdecimal() or int(number) not in kept:
        raise ValueError(
            f"gram.teacher={source} will not be there when the phase starts; the checkpoints of this run then are "
            f"those of steps {', '.join(map(str, kept[-4:])) or 'none'}: see checkpoint.keep_every_steps."
        )
    return True


def kept_steps(config: TrainConfig, phase_ends: Sequence[int]) -> list[int]:
    """Steps whose checkpoints are there at the last of these ends, oldest first."""
    if not phase_ends:
        return []
    settings = config.checkpoint
    saved = sorted({*range(settings.every_steps, phase_ends[-1] + 1, settings.every_steps), *phase_ends})
    every = settings.keep_every_steps
    return [step for step in saved if step in saved[-settings.keep_last :] or (every and step % every == 0)]
