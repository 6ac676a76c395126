"""What a run cost over all its sessions, a killed one too, and on which machine."""

import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain.downstream.evals.compared import write_json

_EVERY_S = 5.0
_REPOSITORY = Path(__file__).parents[2]
# What a run reads; records, which it writes, change none.
_CODE = ("benchmarks", "configs", "curation", "pretrain", ":!benchmarks/records")


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """A session of a run: its time, processor time and memory go to FOLDER/sessions every few seconds."""
    sessions = folder / "sessions"
    path = sessions / f"{len(list(sessions.glob('*.json'))):03d}.json"
    is_over, start, before = threading.Event(), time.monotonic(), _processor_s()
    _forget_peak()
    facts = {"started": datetime.now(UTC).strftime("%Y-%m-%d"), **code()}

    def write() -> None:
        spent = {"wall_s": time.monotonic() - start, "processor_s": max(_processor_s() - before, 0.0)}
        write_json(path, facts | spent | {"peak_mib": _peak_mib()})

    def watch() -> None:
        while not is_over.wait(_EVERY_S):
            write()

    write()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        write()


def spent(folder: Path) -> dict[str, Any]:
    """Sums over the sessions of a run; commit and changed files of the last, and of others where they differ."""
    sessions = [json.loads(path.read_text()) for path in sorted((folder / "sessions").glob("*.json"))]
    last = sessions[-1]
    found: dict[str, Any] = {"commit": last["commit"], "changed": last["changed"], "date": last["started"]}
    if earlier := {one["commit"] for one in sessions} - {last["commit"]}:
        found["earlier_commits"] = sorted(str(one) for one in earlier)
    return found | {
        "sessions": len(sessions),
        "minutes": {
            "wall": sum(one["wall_s"] for one in sessions) / 60,
            "processor": sum(one["processor_s"] for one in sessions) / 60,
        },
        "peak_memory_mib": round(max(one["peak_mib"] for one in sessions)),
    }


def machine() -> dict[str, Any]:
    """The processor by its name, its cores, and those that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    } | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def code() -> dict[str, Any]:
    """The commit, and the files of code that differ from it; neither, where there is no repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.rstrip()

    try:
        changed = [line[3:] for line in git("status", "--porcelain", "--", *_CODE).splitlines()]
        return {"commit": git("rev-parse", "HEAD"), "changed": changed[:20]}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": []}


def _processor_s() -> float:
    """Of this process and of what it started, loader workers for instance."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _forget_peak() -> None:
    """One process may make one run after another: each has a peak of its own, where the system can forget."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return int(peak) / 1024 if peak else psutil.Process().memory_info().rss / 2**20
