"""One section of the benchmark, in a process of its own: parts that are measured and written down one by one."""

import argparse
import faulthandler
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.results import RESULTS
from benchmarks.gpu.table import ABSENT, END, FAILED, OK, SECTIONS, Absent, Figures, Part
from pretrain.watch.lines import append_line

if TYPE_CHECKING:
    from benchmarks.gpu.measure import Setting


def run(name: str, parts: Iterator[Part], setting: "Setting", out: Path) -> str:
    """Measure parts one after another, and write each down at once; how it went."""
    outcomes: set[str] = set()
    while True:
        try:
            what, measure = next(parts, (END, None))
        except Exception as error:  # between two parts: what the later ones share
            outcomes.add(_note(out, name, "preparation", error))
            break
        if measure is None:
            break
        start = time.perf_counter()
        if start > setting.end:
            write(out, name, what, {"absent": "not begun: the section's time is over"})
            continue
        setting.begin()
        try:
            figures = measure()
            seconds = {"seconds": round(time.perf_counter() - start, 2)}
            for line in figures if isinstance(figures, list) else [figures]:
                write(out, name, what, {**line, **seconds})
            outcomes.add(OK)
        except Exception as error:
            outcomes.add(_note(out, name, what, error))
        gc.collect()  # a failed part's tensors hang on its traceback
    return next(outcome for outcome in (FAILED, OK, ABSENT) if outcome in outcomes or outcome == ABSENT)


def write(out: Path, name: str, what: str, figures: Figures) -> None:
    append_line(out / RESULTS, {"section": name, "what": what, **figures})


def _note(out: Path, name: str, what: str, error: BaseException) -> str:
    """Write down why there are no figures: a missing package is absent, all else a failure with its traceback."""
    if isinstance(error, Absent):
        write(out, name, what, {"absent": str(error)})
        return ABSENT
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").split(".")[0]) not in _OURS:
        write(out, name, what, {"absent": f"{package} is not installed"})
        return ABSENT
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr)
    write(out, name, what, {"traceback": text[-4000:]})
    return FAILED


_OURS = ("benchmarks", "configs", "curation", "pretrain", "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.section", description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl of this folder gets the lines")
    parser.add_argument("--work", type=Path, required=True, help="folder for tars, runs and checkpoints")
    parser.add_argument("--images", action="append", default=[], help="labelled tar for section J; repeatable")
    parser.add_argument("--seconds", type=float, help="to measure for; without, its end is read from standard input")
    asked = parser.parse_args(arguments)
    faulthandler.enable()
    asked.work.mkdir(parents=True, exist_ok=True)
    write(asked.out, asked.section, END, {"outcome": measured(asked)})


def measured(asked: argparse.Namespace) -> str:
    """Import, wait for the start, measure; how it went."""
    name, begun, failure, parts, measure = asked.section, time.perf_counter(), None, None, None
    try:
        measure = importlib.import_module("benchmarks.gpu.measure")
        module = importlib.import_module(f"benchmarks.gpu.{SECTIONS[name].module}")
        parts = getattr(module, SECTIONS[name].function)
    except Exception as error:
        failure = error
    import_s = time.perf_counter() - begun
    # All of the above happens while the section before this one still has the device.
    if asked.seconds:
        seconds = asked.seconds
    elif end := sys.stdin.readline().strip():
        seconds = float(end) - time.monotonic()  # one clock for all processes; importing may have used some of it
    else:
        sys.exit("whoever started this section is gone")
    # Where it stood, should it be killed. By a signal: dump_traceback_later reads the frames of a thread that goes on,
    # and has crashed here.
    faulthandler.register(signal.SIGALRM, all_threads=False)
    signal.setitimer(signal.ITIMER_REAL, max(seconds - 0.5, 0.1))
    if failure is not None or measure is None or parts is None:
        return _note(asked.out, name, "imports", failure or AssertionError())
    try:
        setting = measure.setting(asked.device, seconds, asked.work, asked.images)
    except Exception as error:
        return _note(asked.out, name, "device", error)
    write(asked.out, name, "start", {"device": setting.device_name, "import_s": round(import_s, 2)})
    return run(name, parts(setting), setting, asked.out)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing may keep a finished section from ending: threads, workers, a process group
