"""A run never deletes or overwrites what it did not write: someone's files are named, and stay byte for byte."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.demo.pool import make_demo
from curation.engine.folder import Folder
from curation.engine.ownership import check_run_folder, file_names
from curation.run import main
from curation.steps import plan_steps
from tests.conftest import picture_tar
from tests.tiny_run import full_run


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_tar(tmp_path_factory.mktemp("foreign") / "pool.tar", range(8))


@pytest.fixture(scope="module")
def finished(pool: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(pool, out)) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def arguments(pool: Path, out: Path, *more: str) -> list[str]:
    settings = ["--config", "offline", "execution.workers=1", "execution.memory_gb=0.5", "retrieve.k=2"]
    return ["--seed", str(pool), "--pool", str(pool), "--out", str(out), *settings, *more]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in (folder, *folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def someones(*names: str, content: str = "mine") -> Callable[[Path], None]:
    def make(out: Path) -> None:
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(content)

    return make


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (someones("shards/family.jpg"), "shards"),
        (someones("shards/shard-000000.tar", "shards/index/shard-000000.parquet"), "shards"),
        (someones("embed/model.py"), "embed"),
        (someones("embed/pool/index/part-0.parquet"), "embed"),
        (someones("filter/cells/dedup"), "filter"),
        (someones("report.html"), "report.html"),
        (someones("report/thesis.tex"), "report"),
        (someones("decisions.parquet"), "decisions.parquet"),
        (someones("run.json"), "run.json"),
        (someones("run.json", content='{"config": {}}'), "run.json"),
        (someones("shards/manifest.json", content='{"version": 3}'), "shards"),
        (someones("shards/started.json", content='"today"'), "shards"),
        (someones("demo/pool/pool-0000.tar"), "demo"),
        (someones("config.yaml", "checkpoints/step-00000001/manifest.json"), "checkpoints, config.yaml"),
        (someones("a", "b", "c", "d"), "a, b, c and 1 more"),
    ],
)
def test_a_folder_without_a_record_of_ours_is_named_and_left(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable, found: str, more: list[str]
) -> None:
    out = tmp_path / "out"
    make(out)
    before = digests(out)
    assert main(arguments(pool, out, *more)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"error: {out} is not empty ({found}) and holds no run of curation.run: ")
    assert digests(out) == before
    assert main(["--seed", "demo", "--out", str(out), *more]) == 1
    assert digests(out) == before


@pytest.mark.parametrize("out", ["file", "file/run", "file/some/run"])
def test_a_file_is_no_folder(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(arguments(pool, tmp_path / out)) == 1
    assert f"error: {tmp_path / 'file'} is a file: --out names a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("gone", "put", "words"),
    [
        # Someone's files where a stage of our run is still to be written.
        (["shards"], someones("shards/family.jpg"), "shards is where a stage of this run is written"),
        (["embed/seed-pool"], someones("embed/seed-pool/a.npy"), "embed/seed-pool is where a stage"),
        (["retrieve/pool"], someones("retrieve/pool/matches.parquet"), "retrieve/pool is where a stage"),
        # Someone's report, where ours would go.
        (["report", "report.html", "report.json", "decisions.parquet"], someones("report.html"), "holds report.html"),
        (["report", "report.html", "report.json"], someones(), "holds decisions.parquet"),
        (["run.json"], someones("run.json"), "run.json is not of curation.run"),
    ],
)
def test_in_a_run_of_ours_too(
    pool: Path, run: Path, capsys: pytest.CaptureFixture[str], gone: list[str], put: Callable, words: str
) -> None:
    for name in gone:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    put(run)
    before = digests(run)
    assert main(arguments(pool, run)) == 1
    assert words in capsys.readouterr().err
    assert digests(run) == before


@pytest.mark.parametrize("name", ["shards/family.jpg", "shards/index/notes.txt", "shards/old/shard-000000.tar"])
def test_someone_s_file_among_ours_keeps_ours_from_being_cleared(
    pool: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    someones(name)(run)
    before = digests(run / "shards")
    assert main(arguments(pool, run)) == 0, "nothing needs to be cleared"
    assert main(arguments(pool, run, "shard.seed=1")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"shards holds what this program did not write ({name.removeprefix('shards/')})" in error
    assert digests(run / "shards") == before
    (run / name).unlink()
    assert main(arguments(pool, run, "shard.seed=1")) == 0


def test_what_systems_leave_is_no_obstacle_and_stays(pool: Path, run: Path) -> None:
    names = [".DS_Store", "shards/.DS_Store", "shards/._shard-000000.tar", "shards/Thumbs.db", "slurm-1.out"]
    someones(*names)(run)
    (run / "run.json").unlink()
    assert main(arguments(pool, run, "shard.seed=2")) == 0
    assert all((run / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize(
    "left", [["run.json"], ["embed"], ["shards"], ["retrieve"], ["report"], ["run.json", "embed", "filter"]]
)
def test_what_is_left_of_a_run_of_ours_is_ours(run: Path, left: list[str]) -> None:
    for path in run.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    check_run_folder(Folder(str(run)))


def test_every_file_of_a_run_has_a_name_of_ours(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> None:
    """Or the next run would not clear it."""
    run = full_run(tmp_path_factory.getbasetemp())
    copy = Path(shutil.copytree(run.folder.path(), tmp_path_factory.mktemp("copy") / "run"))
    steps = plan_steps(run)
    assert {step.stage for step in steps} >= {"embed", "cluster", "balance", "shard", "report"}
    for step in steps:
        (copy / step.name / "manifest.json.0123abcd.tmp").write_text("a killed write")
        Folder(str(copy / step.name)).clear(file_names(step.stage))
        assert not [path for path in (copy / step.name).rglob("*") if path.is_file()]
    assert sorted(path.name for path in copy.iterdir() if path.is_file()) == [
        "decisions.parquet", "report.html", "report.json",
    ]  # fmt: skip


# --- the demo, and scratch folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pool/pool-0000.tar", "holiday.jpg", "demo.json"])
def test_a_demo_is_not_drawn_over_other_files(tmp_path: Path, name: str) -> None:
    someones(name)(tmp_path)
    with pytest.raises(ValueError, match="is where a demo is drawn, and holds other files"):
        make_demo(tmp_path, num_images=100)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(name).name]
    assert (tmp_path / name).read_text() == "mine"


def test_an_unfinished_demo_is_drawn_again_and_other_files_stay(tmp_path: Path) -> None:
    recipe = {"version": 1, "seed": 0, "num_images": 100}
    someones("demo.json", content=json.dumps(recipe))(tmp_path)
    someones("pool/pool-0009.tar", "seed/seed-0000.tar.partial")(tmp_path)
    someones("pool/holiday.jpg")(tmp_path)
    with pytest.raises(ValueError, match=r"pool/holiday\.jpg"):
        make_demo(tmp_path, num_images=100)
    assert (tmp_path / "pool" / "pool-0009.tar").exists()
    (tmp_path / "pool" / "holiday.jpg").unlink()
    make_demo(tmp_path, num_images=100)
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["pool-0000.tar"]
