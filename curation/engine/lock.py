"""One run folder, one writer: a lock that a dead holder loses, on local disks, shared file systems and object stores.

    RUN/lock.json                       who writes here: host, process, its start, command, since when
    RUN/lock.json.<token>               who took over from the dead holder of that token; and so on
    RUN/lock.json.<token>.beat          renewed by the living holder of that token every few seconds

A record is created, once, and never changed: the only thing asked of a store is to create a file unless it is there. So
of several commands that see the same dead holder one becomes its successor, and nothing is ever overwritten. The holder
is the last of the chain that starts at lock.json; releasing deletes the chain from its head on. Whoever has created a
record reads the chain again: only a record that it leads to holds.

On the machine of the holder its process decides whether it lives. From elsewhere its beat does: it is looked at twice,
and no two clocks are compared. Curation and training share this file, so it imports neither Ray nor torch.
"""

import json
import logging
import os
import secrets
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from curation.engine.folder import Folder, listed

NAME = "lock.json"
BEAT_S = 5.0
STALE_S = 60.0  # a holder elsewhere that did not beat for so long is dead
_LOOK_S = 1.0
_SETTLE_S = 1.0  # a store that does not know "create unless there" lets the later of two writers win: look after it
_TRIES = 50
_LOGS = (".log", ".out", ".err")
log = logging.getLogger("seedbed.lock")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds, or held, a lock."""

    token: str
    host: str
    machine: str
    """of the running kernel and the process numbers seen here; equal: `process` can be looked up"""
    process: int
    started: str
    """what tells the process from a later one of the same number"""
    command: str
    since: str
    """UTC, ISO 8601, to the second"""
    job: str = ""
    """Slurm's cluster and job, and how often it was queued again: Slurm has ended the tries before"""
    restart: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since.replace('T', ' ')[:19]} UTC ({self.command})"


@dataclass
class Lock:
    """A lock that is held. `check` says whether it still is."""

    folder: Folder
    own: Holder
    on_lost: Callable[[], None] = lambda: None
    lost: str = ""
    """a sentence, once another command has the folder"""
    _over: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises ValueError: the lock was lost; nothing more may be written."""
        if self.lost:
            raise ValueError(self.lost)

    def beat_until_over(self) -> None:
        """Show that the holder lives, and see whether it still holds."""
        while not self._over.wait(BEAT_S):
            try:
                chain = _chain(self.folder)
                if not chain or chain[-1].token != self.own.token:
                    taker = f"taken over by {chain[-1]}" if chain else f"removed ({NAME} is gone)"
                    self.lost = f"the lock of {self.folder.url} was {taker}: stopped, so as not to write there too."
                    self.on_lost()
                    return
                _beat(self.folder, self.own.token)
            except Exception as error:  # a store or a network away for a moment takes no lock away
                log.debug("%s: the lock could not be renewed: %s", self.folder.url, error)

    def release(self) -> None:
        """Give the lock back; a lock that was lost is left to who has it."""
        self._over.set()
        if os.getpid() != self.own.process or self.lost:
            return
        with suppress(Exception):  # what cannot be deleted now is taken over later, as that of a dead process
            chain = _chain(self.folder)
            if chain and chain[-1].token == self.own.token:
                names = [NAME, *(f"{NAME}.{holder.token}" for holder in chain[:-1])]
                for name in [*names, *(f"{NAME}.{holder.token}.beat" for holder in chain)]:
                    self.folder.delete(name)


@contextmanager
def hold(folder: Folder, on_lost: Callable[[], None] = lambda: None) -> Iterator[Lock]:
    """Be the only command that writes to a run folder while the block runs.

    Args:
        on_lost: called in another thread, when the lock is lost; the block should come to its end soon.

    Raises:
        ValueError: another command writes there; the message names host, process and since when.
    """
    own = _this_process()
    lock = Lock(folder, own, on_lost)
    try:
        _acquire(folder, own)
        threading.Thread(target=lock.beat_until_over, name="run folder lock", daemon=True).start()
        yield lock
    except KeyboardInterrupt:
        lock.check()  # it was `on_lost` that stopped us: say so
        raise
    finally:
        lock.release()


def check_folder(folder: Folder, has_record: Callable[[Folder], bool], command: str) -> None:
    """See that a run folder is one of ours, or that there is nothing in it; only looks.

    A lock, and what operating systems leave, is nothing; so are logs, which a shell makes before a command starts.

    Args:
        has_record: whether files that say so were written by earlier runs of `command`.

    Raises:
        ValueError: it is a file, cannot be read, or holds something else.
    """
    try:
        if folder.is_local:
            place = Path(folder.path()).absolute()
            file = next((p for p in (place, *place.parents) if p.exists() and not p.is_dir()), None)
            if file is not None:
                raise ValueError(f"{file} is a file: --out names a folder; give another.")
        found = [name for name in folder.entries() if not name.startswith(NAME) and not name.endswith(_LOGS)]
        if found and not has_record(folder):
            raise ValueError(
                f"{folder.url} is not empty ({listed(found)}) and holds no run of {command}: give another --out, or "
                "move away what is in it. Nothing was changed there."
            )
    except OSError as error:
        raise ValueError(f"{folder.url} cannot be read: {' '.join(str(error).split())}. Give another --out.") from None


def _acquire(folder: Folder, own: Holder) -> None:
    for _ in range(_TRIES):
        chain = _chain(folder)
        before = chain[-1] if chain else None
        if before is not None and not _is_dead(folder, before, own):
            raise ValueError(
                f"{folder.url} is written to by {before}: wait until it has ended, end it, or give another --out."
            )
        name = NAME if before is None else f"{NAME}.{before.token}"
        _beat(folder, own.token)
        if folder.create_bytes(name, json.dumps(asdict(own), indent=1).encode()):
            if not folder.is_local:
                time.sleep(_SETTLE_S)
            chain = _chain(folder)
            if chain and chain[-1].token == own.token:
                if before is not None:
                    log.warning("%s: taking over from %s, which is dead.", folder.url, before)
                return
            if before is not None:  # the chain went while we joined it
                folder.delete(name)
        folder.delete(f"{NAME}.{own.token}.beat")
        time.sleep(0.02)  # someone was faster: see who
    raise ValueError(f"{folder.url}: many commands want its lock at once; run this one again, or give another --out.")


def _chain(folder: Folder) -> list[Holder]:
    """Every holder, from lock.json on; only the last may live."""
    chain: list[Holder] = []
    name = NAME
    while (holder := _read(folder, name)) is not None:
        chain.append(holder)
        name = f"{NAME}.{holder.token}"
    return chain


def _read(folder: Folder, name: str) -> Holder | None:
    for _ in range(10):
        try:
            return Holder(**json.loads(folder.read_bytes(name)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # being written, where a file cannot appear whole
            time.sleep(0.1)
    raise ValueError(
        f"{folder.url}/{name} is no lock of ours: if no other command writes to that folder, delete the file."
    )


def _is_dead(folder: Folder, holder: Holder, own: Holder) -> bool:
    """Whether a holder no longer lives; from another machine that takes up to STALE_S."""
    if holder.machine == own.machine:
        return _start_of(holder.process) != holder.started
    if own.job and holder.job == own.job and holder.restart < own.restart:
        return True
    log.warning("%s has a lock of %s; watching for up to %.0f s whether it still lives.", folder.url, holder, STALE_S)
    first, end = _last_beat(folder, holder.token), time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(_LOOK_S)
        if _last_beat(folder, holder.token) != first:
            return False
        chain = _chain(folder)
        if not chain or chain[-1].token != holder.token:
            return True  # released, or taken over by a third: the next look says which
    return True


def _beat(folder: Folder, token: str) -> None:
    name = f"{NAME}.{token}.beat"
    if not folder.is_local:
        folder.write_bytes(name, secrets.token_bytes(8))
        return
    path = Path(folder.path(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a full disk has room for a time


def _last_beat(folder: Folder, token: str) -> bytes | int | None:
    name = f"{NAME}.{token}.beat"
    with suppress(FileNotFoundError):
        if not folder.is_local:
            return folder.read_bytes(name)
        with open(folder.path(name), "rb") as file:  # opened, for NFS to look it up anew
            return os.fstat(file.fileno()).st_mtime_ns
    return None


# --- this process, and others of this machine -------------------------------------------------------------------------


def _this_process() -> Holder:
    job, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
        started=_start_of(os.getpid()) or "",
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        job=f"{cluster}/{job}" if job else "",
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def _machine() -> str:
    """Hosts may share a name, and containers a kernel: the boot, and the numbering of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _start_of(process: int) -> str | None:
    """When a process started, as text to compare; None: there is none of that number, or it has ended."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
