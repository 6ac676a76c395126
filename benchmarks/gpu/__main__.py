"""python -m benchmarks.gpu --out FOLDER [--sections A,B,...] [--minutes 7.5]: see the package's own words."""

import argparse
import ctypes
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import psutil

import benchmarks.gpu
from benchmarks.gpu.results import LOG, RESULTS, by_section, missed, read_results
from benchmarks.gpu.table import ABSENT, END, OK, SECTIONS
from pretrain.watch.lines import append_line

MINUTES = 7.5
"""of all sections; fewer sections take their share of it, unless --minutes says otherwise"""
KILLING_S = 2
"""of the whole time, to see that nothing is left of the last section"""
REPOSITORY = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every section ended well or is absent; 1: one failed, or a check is beyond its tolerance; 2: a wrong input."""
    asked = _parser().parse_args(arguments)
    try:
        names = chosen(asked.sections)
        whole = sum(section.seconds for section in SECTIONS.values())
        share = sum(SECTIONS[name].seconds for name in names) / whole
        budget_s = 60 * (asked.minutes if asked.minutes is not None else MINUTES * share)
        if budget_s <= 0:
            raise ValueError(f"--minutes {asked.minutes} must be above 0.")
        for path in asked.images:
            if not Path(path).is_file():
                raise ValueError(f"--images {path} is no file: give a tar of labelled images.")
        if asked.device == "cuda" and num_gpus() < 1:
            raise ValueError("--device cuda, and the driver finds no GPU here; --device cpu runs it at tiny sizes.")
        if (asked.out / RESULTS).exists():
            raise ValueError(f"{asked.out} holds the results of another run; give another --out.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    run = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "revision": asked.revision or git_revision(),
        "python": platform.python_version(),
        "sections": ",".join(names),
        "minutes": budget_s / 60,
    }
    append_line(asked.out / RESULTS, {"run": run})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        run_sections(names, budget_s, asked, Path(work))
    return summary(asked.out)


def chosen(sections: str) -> list[str]:
    """Names of sections in their order. Raises ValueError: one that does not exist."""
    asked = [name.strip().upper() for name in sections.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in SECTIONS]:
        known = "; ".join(f"{name}: {section.what}" for name, section in SECTIONS.items())
        raise ValueError(f"--sections {sections}: there is no section {unknown[0]!r}. The sections are {known}.")
    return [name for name in SECTIONS if name in asked or not asked]


def num_gpus() -> int:
    """As the driver counts them, without loading torch."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def git_revision() -> str:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip()[:12] + (" and changes" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Started:
    """A section's process, which has imported what it needs, or is about to, and waits to be told its seconds."""

    name: str
    process: subprocess.Popen[str]


def start(name: str, asked: argparse.Namespace, work: Path, log: IO[str]) -> Started:
    python = [sys.executable, "-m"]
    if SECTIONS[name].torchrun:
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    command = [*python, "benchmarks.gpu.section", name, "--device", asked.device]
    command += ["--out", str(asked.out.resolve()), "--work", str(work)]
    for path in asked.images:
        command += ["--images", str(Path(path).resolve())]
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": search, "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=work,
        env=environment,
        start_new_session=True,
    )
    return Started(name, process)


def run_sections(names: list[str], budget_s: float, asked: argparse.Namespace, work: Path) -> None:
    """One after another, the next one importing meanwhile; time that one leaves over goes to those after it."""
    end = time.monotonic() + budget_s - KILLING_S
    with (asked.out / LOG).open("a", encoding="utf-8") as log:
        waiting: list[Started] = []
        try:
            waiting.append(start(names[0], asked, work, log))
            for i, name in enumerate(names):
                if i + 1 < len(names):
                    waiting.append(start(names[i + 1], asked, work, log))
                left = sum(SECTIONS[other].seconds for other in names[i:])
                limit_s = max(end - time.monotonic(), 0) * SECTIONS[name].seconds / left
                line = finish(waiting.pop(0), limit_s, asked.out)
                append_line(asked.out / RESULTS, {"section": name, **line, "limit_s": round(limit_s, 1)})
                print(f"{name}  {line['ended']:28} {line['seconds']:6.1f} s of {limit_s:5.1f}", flush=True)
        finally:
            for section in waiting:
                kill(section.process)


def finish(section: Started, limit_s: float, out: Path) -> dict[str, object]:
    """Let a section measure for so long, and see that nothing of it is left; how it ended."""
    process, begun = section.process, time.monotonic()
    try:
        process.communicate(f"{begun + limit_s}\n", timeout=limit_s)
        died = f"died: exit status {process.returncode}, see {LOG}"
        status = next((line["outcome"] for line in read_results(out) if _is_end(line, section.name)), died)
    except subprocess.TimeoutExpired:
        status = f"killed after {limit_s:.0f} s"
    kill(process)
    end_torn_line(out / RESULTS)
    return {"ended": status, "seconds": round(time.monotonic() - begun, 2)}


def _is_end(line: dict[str, object], name: str) -> bool:
    return line.get("section") == name and line.get("what") == END


def kill(process: subprocess.Popen[str]) -> None:
    """The process, everything it started (torchrun's rank and compilers have sessions of their own), and its group."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    for child in tree:
        try:
            tree += [found for found in child.children(recursive=True) if found not in tree]
            child.kill()
        except psutil.NoSuchProcess:
            continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(tree, timeout=5)


def end_torn_line(path: Path) -> None:
    """A killed section may leave half a line; the next line is not to be part of it."""
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def summary(out: Path) -> int:
    """Say what did not go well, in a line each; the exit status."""
    status = 0
    for name, figures, end in by_section(read_results(out)):
        troubles = [
            f"{line['what']}: {line['traceback'].strip().splitlines()[-1]}" for line in figures if "traceback" in line
        ]
        troubles += [f"{what}: beyond its tolerance" for what in missed(figures)]
        for trouble in troubles:
            print(f"{name}  {trouble}")
        good = end.get("ended") in (OK, ABSENT) and not troubles
        status = status if good else 1
    print(f"the tables: python -m benchmarks.gpu.report {out}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for results.jsonl and log.txt")
    parser.add_argument("--sections", default="", help="names, such as A,B; default: all")
    parser.add_argument("--minutes", type=float, help=f"for all of them together; default: {MINUTES} for all sections")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: everything at tiny sizes")
    parser.add_argument("--images", action="append", default=[], help="tar of labelled images for J; repeatable")
    parser.add_argument("--revision", default="", help="of the code, where git cannot say")
    return parser


if __name__ == "__main__":
    sys.exit(main())
