"""--exclude: a run keeps no image that another run keeps, of the same bytes or the same look."""

import io
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from curation.account.explain import explain
from curation.engine.folder import Folder
from curation.run import finished_run, main
from curation.stages import exclude
from tests.conftest import encoded, picture, write_tar

SETTINGS = ["--config", "offline", "execution.workers=2", "range_rows=4", "balance.num_images=20"]


def rows_of(run: Path) -> dict[str, dict]:
    return {row["key"]: row for row in pq.read_table(run / "decisions.parquet").to_pylist()}


def kept_of(run: Path) -> list[str]:
    return sorted(key for key, row in rows_of(run).items() if row["status"] == "kept")


def pixels(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.fixture(scope="module")
def root(tmp_path_factory, ray_session) -> Path:
    return tmp_path_factory.mktemp("exclude")


@pytest.fixture(scope="module")
def first(root: Path) -> Path:
    """Keeps 5 of 9 images, and a seed image that is included as it is."""
    pool = write_tar(root / "pool.tar", [(f"p{i}.jpg", encoded(picture(i), quality=90)) for i in range(9)])
    seed = write_tar(root / "as-is.tar", [("s.jpg", encoded(picture(50), quality=90))])
    rules = root / "as-is.yaml"
    rules.write_text(f"urls: ['{seed}']\ninclude_as_is: true\nretrieve: {{mode: none}}\n")
    out = root / "first"
    arguments = ["--pool", str(pool), "--seed", str(rules), "--out", str(out), *SETTINGS, "balance.num_images=5"]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def arguments(root: Path, first: Path) -> list[str]:
    """Of all nine the bytes under other names; of those kept the pixels, as they are and mirrored; some new ones."""
    content = {i: encoded(picture(i), quality=90) for i in range(9)}
    members = [(f"same{i}.jpg", content[i]) for i in range(9)]
    for key in kept_of(first):
        image = pixels(content[int(key[1:])])
        members += [
            (f"png{key}.png", encoded(image, "PNG")),
            (f"flip{key}.png", encoded(ImageOps.mirror(image), "PNG")),
        ]
    members += [(f"new{i}.jpg", encoded(picture(i), quality=90)) for i in range(20, 24)]
    members += [("seed.jpg", encoded(picture(50), quality=90)), ("broken.jpg", b"\xff\xd8 no")]
    pool = write_tar(root / "other.tar", members)
    return ["--pool", str(pool), "--exclude", str(first), *SETTINGS]


@pytest.fixture(scope="module")
def second(root: Path, arguments: list[str]) -> Path:
    assert main([*arguments, "--out", str(root / "second")]) == 0
    return root / "second"


@pytest.mark.slow
def test_what_the_other_run_keeps_is_left_out(first: Path, second: Path) -> None:
    theirs, rows = kept_of(first), rows_of(second)
    assert len(theirs) == 5
    excluded = {key for key, row in rows.items() if row["reason"] == "excluded"}
    named = {f"{kind}{key}" for kind in ("png", "flip") for key in theirs}
    assert excluded == named | {f"same{key[1:]}" for key in theirs} | {"seed"}
    assert all(rows[key]["status"] == "rejected" for key in excluded)
    left = [f"same{i}" for i in range(9) if f"p{i}" not in theirs] + [f"new{i}" for i in range(20, 24)]
    assert kept_of(second) == sorted(left)
    assert rows["broken"]["reason"] not in (None, "excluded")


def test_the_account_says_which_image_it_was(first: Path, second: Path) -> None:
    key = kept_of(first)[0]
    assert f"{first} has image {key} (the very same bytes)." in " ".join(explain(str(second), f"same{key[1:]}").split())
    assert f"{first} has image {key} (equal perceptual hashes)." in " ".join(explain(str(second), f"flip{key}").split())
    assert f"{first} has image s (the very same bytes)." in " ".join(explain(str(second), "seed").split())
    page = (second / "report.html").read_text()
    assert f"--exclude {first}" in page
    assert "a run named by --exclude keeps an image of the same bytes" in page


@pytest.mark.slow
def test_one_range_says_the_same(root: Path, arguments: list[str], second: Path) -> None:
    out = root / "whole"
    assert main([*arguments, "--out", str(out), "range_rows=100"]) == 0
    names = ("gid", "status", "reason", "shard")
    assert [[row[name] for name in names] for row in rows_of(out).values()] == [
        [row[name] for name in names] for row in rows_of(second).values()
    ]


@pytest.mark.slow
def test_another_result_of_that_run_is_another_key(root: Path, first: Path, arguments: list[str], capsys) -> None:
    """The excluded run goes on, keeping less: what it gave back may be kept; without a change nothing runs."""
    other, out = root / "copy", root / "follows"
    shutil.copytree(first, other)
    words = [str(other) if word == str(first) else word for word in arguments]
    assert main([*words, "--out", str(out)]) == 0
    before = kept_of(out)
    capsys.readouterr()
    assert main([*words, "--out", str(out)]) == 0
    steps = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("exclude/copy", "filter"))]
    assert [line.split(maxsplit=1)[1] for line in steps] == ["as before"] * 2
    less = ["--pool", str(root / "pool.tar"), "--seed", str(root / "as-is.yaml"), "--out", str(other), *SETTINGS]
    assert main([*less, "balance.num_images=2"]) == 0
    assert len(kept_of(other)) == 2
    assert main([*words, "--out", str(out)]) == 0
    assert len(kept_of(out)) == len(before) + 3


def test_a_run_on_an_object_store_says_the_same(first: Path, s3) -> None:
    s3.put(str(first), "bucket/first", recursive=True)
    told = []
    for url in (str(first), "s3://bucket/first"):
        run = finished_run(url)
        items = [exclude._Item(start, min(start + 4, 9)) for start in (0, 4, 8)] + [exclude._Item(0, 1, seed=0)]
        kept = exclude.Kept.of(run)
        told.append([table for item in items for table in exclude._identities(item, kept, Folder(url), 3, Folder(url))])
    assert told[0] == told[1]
    assert sum(table.num_rows for table in told[0]) == 2 * 6


def test_a_dry_run_says_so(root: Path, arguments: list[str], first: Path, capsys) -> None:
    assert main([*arguments, "--out", str(root / "dry"), "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "exclude/first" in told
    assert "equal perceptual hashes" in told
    assert not (root / "dry").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--exclude", "FIRST", "--out", "FIRST"], "a run cannot exclude what it keeps itself."),
        (["--exclude", "FIRST", "--extend", "FIRST"], "its images stay, or are left out; choose one."),
        (["--exclude", "FIRST", "--exclude", "FIRST"], "twice: once is enough."),
        (["--exclude", "NOWHERE"], "there is no folder"),
        (["--exclude", "UNFINISHED"], "is a run that has not finished (done: embed/pool, filter)"),
        (["--exclude", ""], "--exclude is empty"),
    ],
)
def test_mistakes_are_one_sentence(root: Path, first: Path, tmp_path: Path, capsys, more, sentence) -> None:
    if "UNFINISHED" in more:
        for step in ("embed/pool", "filter"):
            shutil.copytree(first / step, tmp_path / "begun" / step)
    words = {"FIRST": str(first), "NOWHERE": str(tmp_path / "none"), "UNFINISHED": str(tmp_path / "begun")}
    given = [words.get(word, word) for word in more]
    out = [] if "--out" in given else ["--out", str(tmp_path / "run")]
    assert main(["--pool", str(root / "pool.tar"), *given, *out, *SETTINGS]) == 1
    assert sentence in capsys.readouterr().err
