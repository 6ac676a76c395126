"""shard.format=parquet: images for Hugging Face's `datasets`, for our own sources, and for the trainer by offset."""

import hashlib
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from curation.reading.listing import find_parts
from curation.reading.sources import MemberReader, read_samples
from curation.stages.shard import ShardConfig
from curation.writing.parquet import ParquetShardBuilder
from curation.writing.samples import ABOUT, Layout, ShardSample, complete, unpack_others
from pretrain.data.collate import Batch
from pretrain.data.crops import CropsConfig
from pretrain.data.decode import Damaged, ImageLimits
from pretrain.data.loader import DataConfig, DatasetConfig, LoaderConfig, build_loader
from pretrain.data.masks import MaskConfig
from pretrain.data.shards import ShardReader, read_table
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.hostile_samples import hostile_run, pool

COLUMNS = ["image", "text", "label", *ABOUT, "others"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, ray_session) -> Path:
    return Path(hostile_run(tmp_path_factory.getbasetemp(), "parquet").folder.path("shards"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory, ray_session) -> Path:
    return Path(hostile_run(tmp_path_factory.getbasetemp(), "webdataset").folder.path("shards"))


def images() -> dict[str, bytes]:
    return {key: next(iter(members.values())) for key, members in pool().items()}


def files(shards: Path) -> list[str]:
    found = sorted(str(path) for path in shards.glob("shard-*.parquet"))
    assert len(found) == 4
    return found


def test_columns_and_rows(shards):
    rows = [row for path in files(shards) for row in pq.read_table(path).to_pylist()]
    assert pq.read_schema(files(shards)[0]).names == COLUMNS
    assert {row["key"]: row["image"]["bytes"] for row in rows} == images()
    for row in rows:
        members = pool()[row["key"]]
        assert row["sha256"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()
        assert row["image"]["path"].endswith("." + next(iter(members)))
        assert all(row[name] is not None for name in COLUMNS)
        if "npy" in members:
            assert unpack_others(row["others"])["npy"] == members["npy"]
    assert {row["label"] for row in rows} == {-1, 7, -3}


def test_it_holds_what_the_tars_hold(shards, tars):
    """The same samples in the same files, with the same fields."""
    for path in files(shards):
        rows = pq.read_table(path).to_pylist()
        tar = str(tars / Path(path).name.replace(".parquet", ".tar"))
        for row, sample in zip(rows, webdataset.WebDataset(tar, shardshuffle=False), strict=True):
            assert {name: row[name] for name in ABOUT} == json.loads(sample["json"])
            assert (row["image"]["bytes"], row["text"].encode()) == (sample["jpeg"], sample["txt"])
            assert (str(row["label"]).encode(), row["others"]) == (sample["cls"], sample["others.tar"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by", ["files", "folder"])
def test_hugging_face_datasets_decode_it(shards, tmp_path, monkeypatch, streaming, by):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    if by == "files":
        found = datasets.load_dataset("parquet", data_files=files(shards), streaming=streaming)
    else:
        found = datasets.load_dataset(str(shards), streaming=streaming)
    train = found["train"]
    assert list(train.features) == COLUMNS
    assert train.features["image"] == datasets.Image()
    assert all(row["image"].size == (96, 72) and row["image"].format in (None, row["format"]) for row in train)
    raw = train.cast_column("image", datasets.Image(decode=False))
    assert {row["key"]: row["image"]["bytes"] for row in raw} == images()


@pytest.mark.parametrize("asked", ["run", "shards", "glob", "one"])
def test_our_own_sources_read_it(shards, asked):
    """As a pool: through the folder, or file by file; and any image again by its row."""
    url = {
        "run": str(shards.parent),
        "shards": str(shards),
        "glob": f"{shards}/shard-*.parquet",
        "one": files(shards)[0],
    }
    samples = [(part, sample) for part in find_parts([url[asked]]) for sample in read_samples(part, 1 << 20)]
    assert len(samples) == (5 if asked == "one" else 16)
    for part, sample in samples:
        assert sample.content == images()[sample.key]
        assert json.loads(sample.metadata or "")["sha256"] == hashlib.sha256(sample.content).hexdigest()
        with MemberReader("parquet", part.url) as reader:
            assert reader.read(sample.image) == sample.content


def test_the_trainer_reads_it_as_it_reads_the_tars(shards, tars):
    table, expected = read_table(str(shards.parent), ImageLimits()), read_table(str(tars.parent), ImageLimits())
    assert table.blocks.nbytes + table.sizes.nbytes == 8 * len(table)
    reader, other = ShardReader(table), ShardReader(expected)
    assert [reader.read(row) for row in range(len(table))] == [other.read(row) for row in range(len(expected))]
    assert len(table) == 16
    assert table.starts.tolist() == expected.starts.tolist()
    assert not table.refused
    keys = [f"{name.rpartition(':')[2].rpartition('.')[0]}" for name in (reader.name(row) for row in range(16))]
    assert keys == [f"{other.name(row).rpartition(':')[2].rpartition('.')[0]}" for row in range(16)]
    for same in (str(shards), f"{shards}/*.parquet", f"{shards}/shard-00000{{0..3}}.parquet"):
        assert read_table(same, ImageLimits()).fingerprint() == table.fingerprint()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_tars_bit_for_bit(shards, tars, num_workers):
    def batches(folder: Path) -> list[Batch]:
        return list(
            build_loader(
                DataConfig(datasets={"pool": DatasetConfig(shards=str(folder))}),
                CropsConfig(global_px=32, local_px=16, num_local_crops=2),
                MaskConfig(),
                execution=LoaderConfig(num_workers=num_workers, prefetch=2, timeout_s=60),
                patch_size=4,
                seed=0,
                phase=0,
                start_step=0,
                num_steps=5,
                global_batch_size=4,
                rank=0,
                world_size=1,
            )
        )

    for ours, theirs in zip(batches(shards), batches(tars), strict=True):
        assert np.array_equal(ours.global_crops.numpy(), theirs.global_crops.numpy())
        assert np.array_equal(ours.local_crops.numpy(), theirs.local_crops.numpy())
        assert np.array_equal(ours.positions.numpy(), theirs.positions.numpy())
        assert ours.skipped == theirs.skipped


@pytest.mark.slow
def test_training_has_the_losses_that_it_has_on_tars(shards, tars, tmp_path):
    """`pretrain.train --shards RUN/shards`, to the last bit."""
    import yaml

    from tests.pretrain.tiny_train import TINY, losses, run

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for name, folder in (("parquet", shards), ("tars", tars)):
        assert run(tmp_path / "tiny.yaml", folder, tmp_path / name) == 0
    assert losses(tmp_path / "parquet") == losses(tmp_path / "tars")
    assert len(losses(tmp_path / "tars")) == 6


def test_it_is_read_from_a_store_by_range(shards):
    table = read_table(str(shards), ImageLimits())
    fs = fsspec.filesystem("memory")
    fs.put(str(shards), "/remote/shards", recursive=True)
    try:
        remote = read_table("memory://remote/shards", ImageLimits())
        assert remote.fingerprint() == table.fingerprint()
        assert [ShardReader(remote).read(i) for i in range(16)] == [ShardReader(table).read(i) for i in range(16)]
        assert ShardReader(remote).name(3) == ShardReader(table).name(3)
    finally:
        fs.rm("/remote", recursive=True)


def test_what_an_index_claims_beyond_its_file_is_refused(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    path = tmp_path / "shards/shard-000000.parquet"
    path.write_bytes(path.read_bytes()[:3000])
    table = read_table(str(tmp_path / "shards"), ImageLimits())
    assert table.refused["truncated"] >= 1
    path.unlink()
    with pytest.raises(ValueError, match="not there"):
        read_table(str(tmp_path / "shards"), ImageLimits())
    with pytest.raises(Damaged, match="unreadable"):
        ShardReader(table).read(0)


def test_a_foreign_parquet_file_is_metadata_or_a_sentence(tmp_path):
    """img2dataset leaves one beside each tar; alone, it has no images."""
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "00000.parquet")
    for shards in (f"{tmp_path}", f"{tmp_path}/*.parquet", f"{tmp_path}/00000.parquet"):
        with pytest.raises(ValueError, match=r"without a usable image.*Refused: {'no_image_column': 1}"):
            read_table(shards, ImageLimits())
    picture_tar(tmp_path / "00000.tar", range(2))
    assert len(read_table(str(tmp_path), ImageLimits())) == 2


def layout(**changes) -> Layout:
    return Layout(**{"has_label": False, "has_others": False, "draw_names": ("a",), "max_member_bytes": 1000} | changes)


def sample(key: str, image: bytes, layout: Layout) -> ShardSample:
    return ShardSample(key, image, complete({"key": key, "format": "PNG", "draws": {"a": 1}}, layout))


@pytest.mark.parametrize(
    "sizes",
    [[1], [1, 1, 1], [5000, 1, 70_000], [100] * 250, [3 << 20] * 25, [0x01010101 & 0xFFFF] * 5],
    ids=["one byte", "equal", "mixed", "rows fill groups", "bytes fill groups", "lengths that repeat"],
)
def test_every_offset_leads_to_its_bytes(sizes):
    """Contents that repeat, look like lengths, or are long: the index still points at each one's own place."""
    chosen = layout()
    builder = ParquetShardBuilder(chosen)
    rng = np.random.default_rng(0)
    contents = [rng.bytes(size) if i % 2 else bytes(size) for i, size in enumerate(sizes)]
    for i, content in enumerate(contents):
        builder.add(sample(f"k{i}", content, chosen))
    file = bytes(builder.finish())
    assert [(e.key, e.suffix) for e in builder.entries] == [(f"k{i}", "png") for i in range(len(sizes))]
    assert [file[e.offset : e.offset + e.size] for e in builder.entries] == contents
    assert [e.sha256 for e in builder.entries] == [hashlib.sha256(content).hexdigest() for content in contents]
    starts = [e.offset for e in builder.entries]
    assert starts == sorted(set(starts))
    metadata = pq.read_metadata(pa.BufferReader(file))
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    assert all(g.num_rows <= 100 for g in groups)
    assert all(g.column(0).total_uncompressed_size <= (36 << 20) for g in groups)
    assert sum(g.num_rows for g in groups) == len(sizes)
    again = ParquetShardBuilder(chosen)
    for i, content in enumerate(contents):
        again.add(sample(f"k{i}", content, chosen))
    assert bytes(again.finish()) == file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "zip"}, "shard.format='zip' must be one of webdataset, parquet"),
        ({"format": "tar"}, "shard.format='tar'"),
        ({"format": "parquet", "max_mb": 5000.0}, "shard.max_mb=5000 must be at most 2000"),
        ({"max_images": 0}, "1 or more"),
    ],
)
def test_a_mistake_in_the_settings_is_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        ShardConfig(**settings)


@pytest.mark.slow
def test_the_command_writes_it_and_curates_it_again(tmp_path, ray_session, capsys):
    """`shard.format=parquet` on the command line; its shards as the next run's pool, and as its seed."""
    from curation.account.explain import explain
    from curation.run import main

    pool = write_tar(tmp_path / "pool.tar", [(f"k{i}.jpg", encoded(picture(i))) for i in range(6)])
    common = ["--config", "offline", "execution.workers=2", "shard.format=parquet"]
    arguments = ["--pool", str(pool), "--out", str(tmp_path / "one"), "balance.num_images=6"]
    assert main([*common, *arguments, "--dry-run"]) == 0
    assert "Parquet file" in capsys.readouterr().out
    assert main([*common, *arguments]) == 0
    assert "at byte" in explain(str(tmp_path / "one"), "k3")
    assert "k3.jpg" in explain(str(tmp_path / "one"), "k3")
    again = str(tmp_path / "one/shards/shard-*.parquet")
    assert main([*common, "--pool", again, "--seed", again, "--out", str(tmp_path / "two"), "retrieve.k=1"]) == 0
    before, after = (read_table(str(tmp_path / name), ImageLimits()) for name in ("one", "two"))
    assert sorted(map(ShardReader(before).read, range(6))) == sorted(map(ShardReader(after).read, range(len(after))))
    decisions = pq.read_table(tmp_path / "two/decisions.parquet", columns=["key", "status"])
    assert decisions["key"].to_pylist() == [row["key"] for row in pq.read_table(files_of(tmp_path / "one")).to_pylist()]
    assert set(decisions["status"].to_pylist()) == {"kept"}


def files_of(run: Path) -> str:
    (path,) = (run / "shards").glob("shard-*.parquet")
    return str(path)
