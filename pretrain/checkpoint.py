"""Checkpoints: every rank writes its part in the background; a folder has its name only when all of it is on the disk.

    RUN/checkpoints/step-00012500/rank-00000-of-00002.safetensors, ..., manifest.json

The format is our own (`distributed.tensor_files`) rather than torch.distributed.checkpoint's: that one unpickles its
metadata, has no checksums, and coordinates ranks by collectives in a background thread, which a lost rank leaves
hanging. Names are those of the plain model: a checkpoint of DDP goes on with FSDP, in one process, or on other ranks.
"""

import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.messages import os_sentence
from configs.ranges import check_ranges
from pretrain.distributed import collectives
from pretrain.distributed.names import plain_name
from pretrain.distributed.tensor_files import (
    DamagedFile,
    Piece,
    Stored,
    TensorFiles,
    header_hash,
    local_rows,
    pieces_of_rank,
    save_tensors,
    write_pieces,
)

FORMAT = "seedbed checkpoint 1"
MANIFEST = "manifest.json"
PREFIX, TEMPORARY = "step-", ".writing-"
OTHER_RANKS_TIMEOUT_S = 1800
_JOIN_S = 30.0
_LEAVINGS = re.compile(rf"{re.escape(TEMPORARY)}(removed-)?{PREFIX}\d{{8}}(-[0-9a-f]+)?")
_FILES = re.compile(r"manifest\.json|rank-\d+(-of-\d+\.safetensors(\.partial)?|\.failed)")
State = Mapping[str, nn.Module | torch.optim.Optimizer | Tensor]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1250
    """Steps between checkpoints; 1 or more. The last step of a phase always gets one."""
    keep_last: int = 3
    """The newest checkpoints to keep; 1 or more."""
    keep_every_steps: int = 0
    """Also keep those whose step is a multiple of this; 0 keeps none of them."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in the processor's memory."""

    def __post_init__(self) -> None:
        ranges = {"every_steps": "[1, inf)", "keep_last": "[1, inf)", "keep_every_steps": "[0, inf)"}
        check_ranges("checkpoint", self, **ranges)


class NotWritten(RuntimeError):
    """A checkpoint is not on the disk; the one before it still is."""


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method, in the same order; what one rank meets, all raise.

    Nothing is changed before `clean` or `save`: who only looks disturbs no run that goes on there.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        # One name for this process's temporary folders, so that leavings of a killed run are never taken for ours.
        self._run = collectives.from_rank_zero(_new_name)
        self._pinned: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._own: set[int] = set()  # steps saved by this run or loaded into it
        self.keep: set[str] = set()  # names of checkpoints that stay, whatever their age

    def save(self, state: State, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the state and write it, in the background when `asynchronous`; waits for the save before this one.

        Args:
            state: modules (wrapped or not), optimizers with named groups (`optim.param_groups`), tensors; by name.
            step: names the folder; of the run, not the phase.
            meta: what JSON can hold, given back by `load` and `read_manifest`.

        Raises:
            NotWritten: the save before this one (or this one, unless asynchronous) failed on some rank.
            ValueError: the folder holds a checkpoint of this step that another run wrote.
        """
        self.wait()
        final = self.folder / f"{PREFIX}{step:08d}"
        if collectives.from_rank_zero(final.exists):
            if step in self._own:
                return
            raise ValueError(f"{final} exists and is not of this run; resume from it, or choose another folder.")
        self._own.add(step)
        rank, num_ranks = collectives.rank(), collectives.world_size()
        pieces = self._stage(pieces_of_rank(_tensors(state), rank, num_ranks))
        content = {"format": FORMAT, "step": step, "num_ranks": num_ranks, "meta": dict(meta)}
        self._thread = threading.Thread(
            target=self._write, args=(final, pieces, rank, content), name=f"checkpoint {step}", daemon=True
        )
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is on the disk. Raises NotWritten if it failed on some rank."""
        if self._thread is None:
            return
        # None is waited for by the others for longer than this, however slow its disk.
        while collectives.any_over_ranks(self._thread.is_alive()):
            self._thread.join(_JOIN_S)
        name, self._thread = self._thread.name, None
        error, self._error = self._error, None
        try:
            self._agree(error, NotWritten, f"{name} was not written: ")
        except NotWritten:
            self.clean()
            self._run = collectives.from_rank_zero(_new_name)
            raise

    def latest(self) -> Path | None:
        """The newest whole checkpoint, as rank 0 sees it."""
        return collectives.from_rank_zero(lambda: self._whole()[-1] if self._whole() else None)

    def without_manifest(self) -> Path | None:
        """A checkpoint newer than the newest whole one that has its name and no manifest, as rank 0 sees it."""

        def newest() -> Path | None:
            named = sorted(path for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())
            return named[-1] if named and not (named[-1] / MANIFEST).exists() else None

        return collectives.from_rank_zero(newest)

    def before(self, step: int) -> Path | None:
        """The newest whole checkpoint of fewer steps, as rank 0 sees it."""
        name = f"{PREFIX}{step:08d}"
        return collectives.from_rank_zero(lambda: max((p for p in self._whole() if p.name < name), default=None))

    def load(self, path: Path, state: State) -> dict[str, Any]:
        """Fill the state in place from a checkpoint that any number of ranks wrote; other names in it are left alone.

        Returns:
            The `meta` that was saved.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of another model: names the first tensor and both shapes.
        """
        meta: dict[str, Any] = {}
        error = None
        try:
            manifest, files = _open(path)
            meta = manifest["meta"]
            _check_names(path, files, state)
            for name, tensor in _tensors(state).items():
                start, local = local_rows(tensor.detach())
                rows = files.read(name, start, start + len(local)) if local.ndim else files.read(name)
                local.copy_(rows)
            self._own.add(manifest["step"])
        except DamagedFile as found:
            error = ValueError(f"{found} {self.without(path)}")
        except ValueError as found:
            error = found
        self._agree(error, ValueError, "")
        return meta

    def without(self, path: Path) -> str:
        """What happens when one of these checkpoints is deleted, for a message that says it is damaged."""
        before = sorted(other for other in self.folder.glob(f"{PREFIX}*") if other.name < path.name)
        if not before:
            return f"Delete {path}, and the same command starts again: there is no checkpoint before it."
        return f"Delete {path}, and the same command continues from {before[-1]}."

    def _agree(self, error: BaseException | None, kind: type[Exception], prefix: str) -> None:
        """Raise on every rank what any rank met."""
        text = None if error is None else f"{error}" if kind is type(error) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            text = os_sentence(error)
        if met := dict.fromkeys(t for t in collectives.from_every_rank(text) if t is not None):
            raise kind(prefix + " ".join(met)) from error

    def clean(self) -> None:
        """Remove what a killed run left unfinished, or half removed; call it when no other run can be at work there."""
        collectives.from_rank_zero(self._clean)

    def _clean(self) -> None:
        for left in self.folder.glob(f"{TEMPORARY}*"):
            if _LEAVINGS.fullmatch(left.name) and _is_ours(left):
                shutil.rmtree(left, ignore_errors=True)

    def _whole(self) -> list[Path]:
        """Checkpoints with a manifest, oldest first."""
        return whole_checkpoints(self.folder)

    @torch.no_grad()
    def _stage(self, pieces: list[Piece]) -> list[Piece]:
        """Copies on the processor: training may go on when this returns."""
        copies = []
        for piece in pieces:
            if piece.tensor.is_cuda:  # pinned memory is slow to get and fast to fill: keep it
                copy = self._pinned.get(piece.name)
                if copy is None or copy.shape != piece.tensor.shape:
                    copy = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=True)
                    self._pinned[piece.name] = copy
            else:
                copy = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype)
            copies.append(Piece(piece.name, piece.shape, piece.start, copy.copy_(piece.tensor, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _write(self, final: Path, pieces: list[Piece], rank: int, content: dict[str, Any]) -> None:
        """In the background: this rank's file, then on rank 0 the manifest and the name. Uses no collectives."""
        temporary = self.folder / f"{TEMPORARY}{final.name}-{self._run}"
        names = [f"rank-{r:05d}-of-{content['num_ranks']:05d}.safetensors" for r in range(content["num_ranks"])]
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            partial = temporary / f"{names[rank]}.partial"
            write_pieces(partial, pieces)
            partial.rename(temporary / names[rank])
            _sync(temporary)
            if rank == 0:
                _await_files(temporary, names)
                content["files"] = {
                    name: {"bytes": (temporary / name).stat().st_size, "header_sha256": header_hash(temporary / name)}
                    for name in names
                }
                _write_json(temporary / MANIFEST, content)
                _sync(temporary)
                temporary.rename(final)
                _sync(self.folder)
                self._remove_old()
        except BaseException as error:  # also what is no Exception must reach the training thread
            self._error = error
            with suppress(OSError):
                (temporary / f"rank-{rank:05d}.failed").touch()  # rank 0 need not wait

    def _remove_old(self) -> None:
        whole = self._whole()
        every = self.config.keep_every_steps
        for path in whole[: -self.config.keep_last]:
            if path.name in self.keep or not _is_ours(path):
                continue
            if not every or int(path.name.removeprefix(PREFIX)) % every:
                # First out of sight: half a checkpoint must not have the name of a whole one.
                shutil.rmtree(path.rename(self.folder / f"{TEMPORARY}removed-{path.name}"))


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder that are on the disk with everything in them, oldest first."""
    return sorted(path.parent for path in folder.glob(f"{PREFIX}*/{MANIFEST}"))


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, num_ranks, meta, files.

    Raises:
        ValueError: there is no checkpoint, or its manifest is not readable.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is no checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path / MANIFEST} is damaged: {error}.") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DamagedFile(f"{path / MANIFEST} is damaged: it does not say what it is.")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path / MANIFEST} is not of the format {FORMAT!r} that this version reads.")
    return manifest


def stored_state(path: Path, prefix: str = "teacher.") -> dict[str, Stored]:
    """Where the tensors of one network of a checkpoint lie, by names without the prefix; needs no process group.

    Raises:
        ValueError: no checkpoint, a damaged one, or nothing of that prefix in it.
    """
    _, files = _open(path)
    state = {name.removeprefix(prefix): files.stored(name) for name in files.names() if name.startswith(prefix)}
    if not state:
        raise ValueError(f"{path} holds nothing named {prefix}*; it has {_listed(_tops(files.names()))}.")
    return state


def teacher_state(path: Path, prefix: str = "teacher.") -> dict[str, Tensor]:
    """The tensors of one network of a checkpoint, whole, on the CPU; raises as `stored_state`."""
    return {name: tensor.read() for name, tensor in stored_state(path, prefix).items()}


def write_teacher(folder: Path, state: Mapping[str, Tensor | Stored], config: Mapping[str, Any]) -> None:
    """teacher.safetensors and config.json, each replaced in one go, the latter last; call it on one rank.

    Of tensors that lie in a checkpoint, one at a time is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "teacher.safetensors.partial"
    save_tensors(state, partial)
    partial.replace(folder / "teacher.safetensors")
    _write_json(folder / "config.json.partial", config)
    (folder / "config.json.partial").replace(folder / "config.json")
    _sync(folder)


def _tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of the state by its name in a file, sharing memory with it."""
    tensors: dict[str, Tensor] = {}
    for key, part in state.items():
        if isinstance(part, nn.Module):
            tensors |= {f"{key}.{plain_name(name)}": tensor for name, tensor in part.state_dict().items()}
        elif isinstance(part, torch.optim.Optimizer):
            for group in part.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    tensors |= {f"{key}.{name}.{kind}": value for kind, value in part.state[parameter].items()}
        else:
            tensors[key] = part
    return tensors


def _open(path: Path) -> tuple[dict[str, Any], TensorFiles]:
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != expected["bytes"]:
            raise DamagedFile(f"{file} is damaged: {expected['bytes']} bytes were written, found {found or 'no file'}.")
        if header_hash(file) != expected["header_sha256"]:
            raise DamagedFile(f"{file} is damaged: its header is not the one that was written.")
    return manifest, TensorFiles(path / name for name in manifest["files"])


def _check_names(path: Path, files: TensorFiles, state: State) -> None:
    """Raise ValueError unless the checkpoint holds, under the state's keys, exactly its tensors."""
    expected = _tensors(state)
    tops = tuple(f"{key}." for key in state)
    found = {name for name in files.names() if name in expected or name.startswith(tops)}
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{path} is of another model: it lacks {_listed(missing)}.")
    if unexpected := [name for name in found if name not in expected]:
        raise ValueError(f"{path} is of another model: it has {_listed(sorted(unexpected))}, which this one has not.")
    for name, tensor in expected.items():
        if files.shape(name) != tuple(tensor.shape) or files.dtype(name) != tensor.dtype:
            raise ValueError(
                f"{path} is of another model: {name} is {files.dtype(name)} {list(files.shape(name))} there and "
                f"{tensor.dtype} {list(tensor.shape)} here."
            )


def _new_name() -> str:
    return secrets.token_hex(4)


def _is_ours(folder: Path) -> bool:
    """Whether it holds nothing but files of a checkpoint, so that it may go."""
    return folder.is_dir() and all(_FILES.fullmatch(path.name) for path in folder.iterdir())


def _tops(names: list[str]) -> list[str]:
    return list(dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names))


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _await_files(folder: Path, names: list[str]) -> None:
    """Return when all files are there; their ranks write them on their own."""
    end = time.monotonic() + OTHER_RANKS_TIMEOUT_S
    while missing := [name for name in names if not (folder / name).exists()]:
        if failed := sorted(folder.glob("*.failed")):
            raise OSError(f"{failed[0].stem} could not write its part")
        if time.monotonic() > end:
            raise TimeoutError(f"{_listed(missing)} not written within {OTHER_RANKS_TIMEOUT_S} s")
        time.sleep(0.02)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
