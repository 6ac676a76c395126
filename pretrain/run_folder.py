"""A training's run folder: whether it is ours to write to, and ours alone while we do."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from curation.engine.lock import Folder, Lock, check_folder, hold
from pretrain.checkpoint import read_manifest, whole_checkpoints
from pretrain.distributed import collectives

COMMAND = "pretrain.train"
CONFIG = "config.yaml"
_SECTIONS = ("model", "heads", "optim", "crops", "steps")


def check_run_folder(out: Path) -> None:
    """See that a folder is empty or holds a training of ours. Only looks.

    Raises:
        ValueError: it is a file, or holds something else.
    """
    check_folder(_folder(out), lambda _: _has_record(out), COMMAND)
    if (out / CONFIG).exists() and not _is_config(out / CONFIG):
        raise ValueError(f"{out / CONFIG} is not of {COMMAND}, which writes a file of that name: move it away.")


@contextmanager
def hold_run_folder(out: Path, on_lost: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Be the only training that writes to a folder; the first rank holds the lock for all of them.

    Args:
        on_lost: called in another thread of the first rank when the lock is lost.

    Yields:
        A function that every rank calls, and that raises ValueError on all of them once the lock is lost.

    Raises:
        ValueError: on every rank, when another command writes there.
    """
    with ExitStack() as until_done:

        def take() -> None:
            held.append(until_done.enter_context(hold(_folder(out), on_lost)))

        held: list[Lock] = []
        collectives.from_rank_zero(take)
        yield lambda: collectives.from_rank_zero(lambda: held[0].check())


def write_config(out: Path, text: str) -> None:
    """config.yaml, which also says that the folder is a training's; whole or not at all."""
    _folder(out).write_bytes(CONFIG, text.encode())


def _folder(out: Path) -> Folder:
    return Folder(str(out.absolute()))


def _has_record(out: Path) -> bool:
    if _is_config(out / CONFIG) or any(map(_is_checkpoint, whole_checkpoints(out / "checkpoints"))):
        return True
    # pretrain.launch writes its jobs' files before the first of them starts.
    return any(out.glob("jobs/*/*_submitted.pkl")) or any(out.glob("jobs/*/*_submission.sh"))


def _is_config(path: Path) -> bool:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return content is None or (isinstance(content, dict) and all(name in content for name in _SECTIONS))


def _is_checkpoint(path: Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True
