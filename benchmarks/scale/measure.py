"""What a run of Ray tasks cost: time, processor time, memory of driver and workers, bytes through read and write."""

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")
_EVERY_S = 0.2


class Meter:
    """Watches this process and everything that it started, Ray's workers included, while `step` blocks run."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}
        self.task_bytes = 0
        self._seen: dict[tuple[int, str], tuple[float, int, int]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        before, start, earlier = self._totals(), time.perf_counter(), self.task_bytes
        self._forget_peaks()
        yield
        seconds = time.perf_counter() - start
        processor, read, written = (b - a for a, b in zip(before, self._totals(), strict=True))
        self.steps[name] = {
            "seconds": seconds, "processor_seconds": processor, "read_gb": read / 1e9, "written_gb": written / 1e9,
            "task_gb": self.task_bytes / 1e9, "driver_gb": _driver_gb(),
        }  # fmt: skip
        self.task_bytes = max(self.task_bytes, earlier)
        print(f"  {name:16s}{seconds:9.1f} s{processor:9.1f} s of processor{read / 1e9:9.2f} GB read", flush=True)

    def figures(self) -> dict[str, Any]:
        """Sums over the steps, and the peaks."""
        sums = {name: sum(step[name] for step in self.steps.values()) for name in next(iter(self.steps.values()))}
        return {**sums, "driver_gb": _driver_gb(), "task_gb": self.task_bytes / 1e9, "steps": self.steps}

    def _forget_peaks(self) -> None:
        """A worker does one step's tasks after another's: its peak counts from here on."""
        for pid, _ in self._seen:
            if pid != os.getpid():
                with contextlib.suppress(OSError):
                    (Path("/proc") / str(pid) / "clear_refs").write_text("5")
        with self._lock:
            self.task_bytes = 0

    def _totals(self) -> tuple[float, int, int]:
        self._look()
        with self._lock:
            seconds, read, written = zip(*self._seen.values(), strict=True)
            return sum(seconds), sum(read), sum(written)

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(_EVERY_S)

    def _look(self) -> None:
        """Counters of a process are kept after it ends, as they were last seen."""
        parents, own = {}, os.getpid()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                parents[int(folder.name)] = (int(stat[1]), stat)
        for pid, (_, stat) in parents.items():
            above = pid
            while above not in (own, 0) and above in parents:
                above = parents[above][0]
            if above != own:
                continue
            folder = Path("/proc") / str(pid)
            try:
                io = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
                status = (folder / "status").read_text()
                name = (folder / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            seconds = (int(stat[11]) + int(stat[12])) / _TICK
            is_ours = pid == own or name.startswith("ray::")  # not Ray's own servers
            with self._lock:
                if is_ours:
                    self._seen[pid, stat[19]] = (seconds, int(io["rchar"]), int(io["wchar"]))
                peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
                if pid != own and is_ours:
                    self.task_bytes = max(self.task_bytes, int(peak) * 1024)


def _driver_gb() -> float:
    """The peak of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
