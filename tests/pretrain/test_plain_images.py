"""Folders of images, lists of files and Parquet data sets as a training's images, without a conversion."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.data.decode import Damaged, ImageLimits
from pretrain.data.shards import ShardReader, read_table
from pretrain.data.sources import find_sources
from tests.conftest import encoded, picture, write_tar
from tests.pretrain.tiny_train import losses, run, same_teacher

LIMITS = ImageLimits()
IMAGES = {f"{'cat' if i < 9 else 'dog'}/p{i:04d}.jpg": encoded(picture(i), quality=90) for i in range(16)}
BROKEN = "dog/p9999.jpg"
IMAGES_AND_BROKEN = IMAGES | {BROKEN: b"\xff\xd8\xff no image"}


def folder(root: Path) -> Path:
    """Nested, with what people leave in folders."""
    for name, content in IMAGES_AND_BROKEN.items():
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "images" / ".DS_Store").write_bytes(b"x")
    (root / "images" / "cat" / "p0000.txt").write_text("a caption")
    (root / "images" / "notes.md").write_text("words")
    (root / "images" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "images" / "pipe.jpg")
    return root / "images"


def text_list(root: Path) -> Path:
    """Relative and absolute names; one that is not there, a folder, a device."""
    images = folder(root)
    names = [f"images/{name}" for name in IMAGES_AND_BROKEN]
    names[3] = str(images / list(IMAGES)[3])
    lines = [*names, "images/none.jpg", "images/cat", "/dev/zero", "", "images/pipe.jpg"]
    (root / "list.txt").write_text("\r\n".join(lines))
    return root / "list.txt"


def parquet(root: Path, num_files: int = 1, rows_per_group: int = 5, **options: object) -> Path:
    """As `datasets` writes: an image column of structs, a label, row groups."""
    below = root / "hf" / "data"
    below.mkdir(parents=True)
    rows = [{"image": {"bytes": content, "path": name}, "label": 3} for name, content in IMAGES_AND_BROKEN.items()]
    for i in range(num_files):
        table = pa.Table.from_pylist(rows[i::num_files])
        name = f"train-{i:05d}-of-{num_files:05d}.parquet"
        pq.write_table(table, below / name, row_group_size=rows_per_group, **options)
    return root / "hf"


def tar(root: Path) -> Path:
    return write_tar(root / "a.tar", list(IMAGES_AND_BROKEN.items()))


KINDS: dict[str, Callable[[Path], Path]] = {"folder": folder, "list": text_list, "parquet": parquet}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_resumes_and_tells_of_damage_as_a_tar_does(kind: str, tmp_path: Path, config: Path) -> None:
    """The same images in the order of their names have the same losses, stopped on the way or not."""
    steps = ["data.shuffle_shards=1", "optim.warmup_steps=1"]
    data = KINDS[kind](tmp_path)
    assert run(config, tar(tmp_path), tmp_path / "tar", "steps=6", *steps) == 0
    assert run(config, data, tmp_path / "whole", "steps=6", *steps) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "tar")
    skipped = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    names = {"folder": BROKEN, "list": f"images/{BROKEN}", "parquet": "train-00000-of-00001.parquet:16"}
    assert {line["image"] for line in skipped} == {names[kind]}
    # Killed after the checkpoint of step 4, and gone on with from another place, two workers beside it.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "again" / "teacher")
    if kind != "list":  # whose third name is absolute
        data = data.rename(tmp_path / "moved")
    assert run(config, data, tmp_path / "again", "steps=6", "execution.loader.num_workers=2", *steps) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert same_teacher(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_gives_every_images_bytes(kind: str, tmp_path: Path) -> None:
    table = read_table(str(KINDS[kind](tmp_path)), LIMITS)
    reader = ShardReader(table)
    assert [reader.read(row) for row in range(len(table))] == list(IMAGES_AND_BROKEN.values())
    assert [reader.read(row) for row in (7, 2, 16, 0)] == [list(IMAGES_AND_BROKEN.values())[i] for i in (7, 2, 16, 0)]
    if kind == "list":
        assert table.refused == {"unreadable": 4}
    if kind == "folder":
        assert [reader.name(row) for row in range(len(table))] == list(IMAGES_AND_BROKEN)


@pytest.mark.slow
def test_a_phase_may_name_them(tmp_path: Path, config: Path) -> None:
    own = {"steps": 1, "data": {"datasets": {"list": {"shards": str(text_list(tmp_path))}}}}
    rows = {"steps": 1, "data": {"datasets": {"rows": {"shards": str(parquet(tmp_path) / "data" / "*.parquet")}}}}
    settings = ["optim.warmup_steps=0", "optim.freeze_last_layer_steps=0", "optim.teacher_temperature_warmup_steps=0"]
    phases = f"phases={json.dumps({'pretrain': {'steps': 1}, 'own': own, 'rows': rows})}"
    assert run(config, tmp_path / "images", tmp_path / "run", phases, *settings) == 0
    assert len(losses(tmp_path / "run")) == 3


def test_images_that_change_are_damage_or_another_dataset(tmp_path: Path) -> None:
    images = folder(tmp_path)
    table = read_table(str(images), LIMITS)
    reader = ShardReader(table)
    first, second, third = (images / name for name in list(IMAGES)[:3])
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    third.write_bytes(third.read_bytes() + b"x")
    for row, reason in enumerate(("unreadable", "truncated", "changed")):
        with pytest.raises(Damaged, match=reason):
            reader.read(row)
    assert read_table(str(images), LIMITS).fingerprint() != table.fingerprint()


def test_hostile_parquet_is_refused_or_damage(tmp_path: Path) -> None:
    """Cut, of noise, with paths and no bytes, damaged inside: counted or Damaged, never a traceback."""
    data = parquet(tmp_path, compression="snappy") / "data"
    (good,) = data.iterdir()
    content = good.read_bytes()
    (data / "cut.parquet").write_bytes(content[:-50])
    (data / "noise.parquet").write_bytes(b"PAR1" + np.random.default_rng(0).bytes(3000) + b"PAR1")
    rows = [{"image": {"bytes": None, "path": "/etc/passwd"}}] * 3
    kind = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    pq.write_table(pa.Table.from_pylist(rows, kind), data / "paths.parquet")
    table = read_table(str(data), LIMITS)
    assert table.refused == {"damaged_shard": 2, "no_image": 3}
    assert len(table) == 17
    with pytest.raises(ValueError, match="hold paths and no bytes: embed the images"):
        read_table(str(data / "paths.parquet"), LIMITS)
    column = pq.ParquetFile(good).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    (data / "damaged.parquet").write_bytes(content[:start] + b"\xff" * 40 + content[start + 40 :])
    reader, reasons = ShardReader(read_table(str(data / "damaged.parquet"), LIMITS)), {}
    for row in range(17):
        try:
            assert reader.read(row) == list(IMAGES_AND_BROKEN.values())[row]
        except Damaged as damage:
            reasons[row] = damage.reason
    assert reasons == dict.fromkeys(range(5, 10), "unreadable")


def test_several_parquet_files_mean_the_same_by_folder_and_glob(tmp_path: Path) -> None:
    data = parquet(tmp_path, num_files=3)
    table = read_table(str(data), LIMITS)
    assert len(table) == len(IMAGES_AND_BROKEN)
    assert len(table.shards) == 3
    for same in (f"{data}/data/*.parquet", f"{data}/data/train-0000{{0..2}}-of-00003.parquet"):
        assert read_table(same, LIMITS).fingerprint() == table.fingerprint()
    fs = fsspec.filesystem("memory")
    fs.put(str(data), "/remote/hf", recursive=True)
    try:
        remote = read_table("memory://remote/hf", LIMITS)
        assert remote.fingerprint() == table.fingerprint()
        assert ShardReader(remote).read(11) == ShardReader(table).read(11)
    finally:
        fs.rm("/remote", recursive=True)


def test_a_folder_in_a_store_is_a_folder(tmp_path: Path) -> None:
    images = folder(tmp_path)
    fs = fsspec.filesystem("memory")
    for name, content in IMAGES_AND_BROKEN.items():
        fs.pipe_file(f"/remote/images/{name}", content)
    try:
        remote = read_table("memory://remote/images", LIMITS)
        assert remote.fingerprint() == read_table(str(images), LIMITS).fingerprint()
        assert ShardReader(remote).read(4) == IMAGES[list(IMAGES)[4]]
    finally:
        fs.rm("/remote", recursive=True)


def test_names_that_are_no_text_and_images_without_suffix_are_read(tmp_path: Path) -> None:
    content = list(IMAGES.values())
    (tmp_path / "a").mkdir()
    odd = os.fsencode(str(tmp_path / "a")) + b"/\xff\xe9 caf\xc3\xa9.jpg"
    with open(odd, "wb") as file:
        file.write(content[0])
    (tmp_path / "a" / "0f3c").write_bytes(content[1])
    (tmp_path / "a" / "drawing.svg").write_text("<svg/>")
    table = read_table(str(tmp_path / "a"), LIMITS)
    assert sorted(ShardReader(table).read(row) for row in range(2)) == sorted(content[:2])
    (tmp_path / "list.txt").write_bytes(odd + b"\na/0f3c")
    listed = read_table(str(tmp_path / "list.txt"), LIMITS)
    assert [ShardReader(listed).read(row) for row in range(2)] == content[:2]


def test_what_is_no_set_of_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="names nothing: give a path a line"):
        find_sources(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="cannot read the list"):
        find_sources(str(tmp_path / "none.txt"))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match="holds no images: give a folder of images"):
        find_sources(str(tmp_path / "words"))
    run_folder = tmp_path / "run"
    (run_folder / "embed").mkdir(parents=True)
    manifest = {"stage": "embed", "version": 1, "key": "", "settings": {}, "inputs": {}, "files": []}
    (run_folder / "embed" / "manifest.json").write_text(json.dumps(manifest))
    write_tar(run_folder / "demo" / "pool.tar", list(IMAGES.items()))
    with pytest.raises(ValueError, match="a run folder of curation without shards"):
        find_sources(str(run_folder))
    for split in ("train", "val"):
        write_tar(tmp_path / "set" / split / "a.tar", list(IMAGES.items()))
    assert len(find_sources(str(tmp_path / "set"))) == 2
    assert "holds val beside a training set" in caplog.text
