"""The benchmark of a GPU, run on a processor: every section to its end, and what happens when one fails or hangs."""

import importlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu.__main__ import chosen
from benchmarks.gpu.measure import Setting
from benchmarks.gpu.report import alike, cell, file_name, table
from benchmarks.gpu.results import by_section, missed, read_results
from benchmarks.gpu.section import run
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu.table import SECTIONS, Absent, Figures, Part
from tests.conftest import REPOSITORY


def benchmark(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--device", "cpu", *options]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=1200)


def ended(out: Path) -> dict[str, str]:
    """Section -> how it ended."""
    return {name: end["ended"] for name, _, end in by_section(read_results(out))}


def broken_package(folder: Path, name: str, error: str) -> dict[str, str]:
    """An environment in which importing a package raises."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"raise {error}\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


# What is asked for


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", list(SECTIONS)), ("b", ["B"]), ("C,A", ["A", "C"]), (" F, d ,", ["D", "F"])],
)
def test_sections_are_chosen_by_name_and_run_in_their_order(asked: str, expected: list[str]) -> None:
    assert chosen(asked) == expected


def test_steps_come_before_parity_and_every_section_has_its_share() -> None:
    names = list(SECTIONS)
    assert names.index("B") < names.index("C")
    assert sum(section.seconds for section in SECTIONS.values()) == 465
    for section in SECTIONS.values():
        assert (REPOSITORY / "benchmarks" / "gpu" / f"{section.module}.py").is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sections", "A,Z"], "no section 'Z'. The sections are A: versions"),
        (["--sections", "kernels"], "no section 'KERNELS'"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--images", "nowhere.tar"], "--images nowhere.tar is no file"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_writes_nothing(tmp_path: Path, options: list[str], sentence: str) -> None:
    done = benchmark(tmp_path / "out", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_results_of_another_run_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"run": {}}\n')
    done = benchmark(tmp_path, "--sections", "A")
    assert done.returncode == 2
    assert "holds the results of another run" in done.stderr
    assert (tmp_path / "results.jsonl").read_text() == '{"run": {}}\n'


# What goes wrong


@pytest.mark.slow
def test_a_section_that_raises_leaves_its_traceback_and_the_next_one_runs(tmp_path: Path) -> None:
    error = "ImportError('libomega.so.1: cannot open shared object file')"
    environment = broken_package(tmp_path / "site", "omegaconf", error)
    done = benchmark(tmp_path / "out", "--sections", "A,B,D", "--minutes", "6", **environment)
    assert done.returncode == 1
    assert ended(tmp_path / "out") == {"A": "ok", "B": "failed", "D": "ok"}
    _, figures, _ = next(s for s in by_section(read_results(tmp_path / "out")) if s[0] == "B")
    assert "libomega.so.1" in figures[0]["traceback"]
    assert "steps.py" in figures[0]["traceback"]
    assert "libomega.so.1" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("section", "package"), [("B", "simplejpeg"), ("C", "omegaconf"), ("K", "faiss")])
def test_a_package_that_is_not_installed_is_said_to_be_absent(tmp_path: Path, section: str, package: str) -> None:
    error = f"ModuleNotFoundError('No module named {package}', name='{package}')"
    environment = broken_package(tmp_path / "site", package, error)
    done = benchmark(tmp_path / "out", "--sections", section, "--minutes", "6", **environment)
    assert done.returncode == 0, done.stdout
    [(_, figures, end)] = by_section(read_results(tmp_path / "out"))
    assert [line["absent"] for line in figures] == [f"{package} is not installed"]
    assert end["ended"] == "absent"


HANGS = "subprocess.Popen(['sleep', '600'], start_new_session=True).wait()"


@pytest.mark.slow
@pytest.mark.parametrize("section", ["H", "I", "L"])
def test_a_section_over_its_time_is_killed_with_its_children_and_keeps_what_it_had(
    tmp_path: Path, section: str
) -> None:
    """H has a rank under torchrun, in a session of its own; I has loader workers; L waits here for a hanging import."""
    environment, minutes = {"SEEDBED_TEST_MARK": uuid.uuid4().hex}, "0.15"
    if section == "L":
        environment |= broken_package(tmp_path / "site", "timm", "SystemError")
        (tmp_path / "site" / "timm.py").write_text(f"import subprocess\n{HANGS}\n")
        minutes = "0.75"
    done = benchmark(tmp_path / "out", "--sections", section, "--minutes", minutes, **environment)
    assert done.returncode == 1
    assert re.fullmatch(r"killed after \d+ s", ended(tmp_path / "out")[section])
    mark = environment["SEEDBED_TEST_MARK"]
    assert not [process for process in psutil.process_iter() if mark in environment_of(process).values()]
    if section == "L":
        [(_, figures, _)] = by_section(read_results(tmp_path / "out"))
        assert [line["what"] for line in figures] == ["start", "ViT-S/14, ours"]
        assert 'timm.py", line 2' in (tmp_path / "out" / "log.txt").read_text()  # where it stood


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def parts() -> Iterator[Part]:
    yield "one line", lambda: {"ms": 1.0}
    yield "two lines", lambda: [{"ms": 2.0}, {"ms": 3.0}]
    yield "fails", lambda: {"ms": 1 / 0}
    yield "lacks a package", lambda: {"ms": importlib.import_module("no_such_package")}
    yield "lacks a device", absent
    yield "goes on", lambda: {"ms": 4.0}


def absent() -> Figures:
    raise Absent("a kernel for GPUs only")


def begin(folder: Path, seconds: float) -> Setting:
    return Setting(torch.device("cpu"), TINY, time.perf_counter() + seconds, folder, ())


@pytest.mark.slow
def test_parts_are_written_down_one_by_one_whatever_the_others_do(tmp_path: Path) -> None:
    assert run("A", parts(), begin(tmp_path, 60), tmp_path) == "failed"
    lines = read_results(tmp_path)
    assert [line.get("ms") for line in lines] == [1.0, 2.0, 3.0, None, None, None, 4.0]
    assert "ZeroDivisionError" in lines[3]["traceback"]
    assert [line.get("absent") for line in lines[4:6]] == ["no_such_package is not installed", "a kernel for GPUs only"]


def test_a_part_that_is_late_is_not_begun(tmp_path: Path) -> None:
    assert run("A", parts(), begin(tmp_path, -1), tmp_path) == "absent"
    assert all("not begun" in line["absent"] for line in read_results(tmp_path))


def test_what_fails_between_two_parts_ends_the_section(tmp_path: Path) -> None:
    def unprepared() -> Iterator[Part]:
        yield "first", lambda: {"ms": 1.0}
        raise OSError("no space left")

    assert run("A", unprepared(), begin(tmp_path, 60), tmp_path) == "failed"
    first, second = read_results(tmp_path)
    assert first["ms"] == 1.0
    assert "no space left" in second["traceback"]


# Tables


def test_lines_with_the_same_fields_make_one_table_and_tracebacks_none() -> None:
    lines = [{"section": "A", "what": "x", "ms": 1.0}, {"what": "y", "absent": "no z"}, {"what": "w", "ms": 12345.6}]
    groups = alike([*lines, {"what": "v", "traceback": "..."}])
    assert groups == [[{"what": "x", "ms": 1.0}, {"what": "w", "ms": 12345.6}], [{"what": "y", "absent": "no z"}]]
    assert table(groups[0]).splitlines() == ["| what | ms |", "| --- | --- |", "| x | 1 |", "| w | 12,346 |"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "yes"), (False, "**NO**"), (None, ""), (0.000123456, "0.0001235"), (65536, "65,536"), ("a|b", "a\\|b")],
)
def test_cells_are_short(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_files_are_named_by_date_device_and_revision() -> None:
    run = {"device": "NVIDIA H100 80GB HBM3", "date": "2027-01-31", "revision": "0123456789abcdef"}
    assert file_name(run) == "gpu-2027-01-31-nvidia-h100-80gb-hbm3-0123456789ab"
    assert file_name({"device": "unknown"}) == "gpu-unknown"


# The whole


@pytest.mark.slow
def test_everything_runs_on_a_processor_and_becomes_tables(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "results"
    done = benchmark(out, "--minutes", "30")  # limits are tested above; a busy machine is not to meet one
    log = (out / "log.txt").read_text()[-3000:]
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert ended(out) == dict.fromkeys(SECTIONS, "ok")
    for name, figures, _ in by_section(read_results(out)):
        assert [line for line in figures if line["what"] != "start" and "absent" not in line], name
        assert missed(figures) == []
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.jsonl"]

    command = [sys.executable, "-m", "benchmarks.gpu.report", str(out), "--results", str(kept)]
    text = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True).stdout
    for name, section in SECTIONS.items():
        assert f"## {name}: {section.what}" in text
    for words in ("images_per_s", "| 3 whole steps | bfloat16 | gradient of step 1 |", "knn_after", "aten::mm"):
        assert words in text
    lines, page = sorted(kept.iterdir())
    assert lines.read_text() == (out / "results.jsonl").read_text()
    assert page.read_text().strip() in text


def test_a_folder_without_results_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.report", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "holds no results.jsonl" in done.stderr
