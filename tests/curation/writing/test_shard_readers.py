"""The default shards open in every reader without an argument, and give back the bytes that the pool had."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from curation.reading.listing import find_parts
from curation.reading.sources import read_samples
from curation.writing.samples import ABOUT, assign_roles, find_layout, read_label, read_text, unpack_others
from pretrain.data.decode import ImageLimits, open_image
from pretrain.data.shards import ShardReader, read_table
from tests.hostile_samples import FORMATS, hostile_run, original, pool

pytestmark = pytest.mark.usefixtures("ray_session")
MEMBERS = {"jpeg", "json", "txt", "cls", "others.tar"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, ray_session) -> Path:
    folder = tmp_path_factory.getbasetemp()
    return Path(hostile_run(folder, "webdataset").folder.path("shards"))


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Hugging Face's library, offline, with its cache in the test's folder."""
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()
    return module


def images() -> dict[str, bytes]:
    return {key: next(iter(members.values())) for key, members in pool().items()}


def urls(shards: Path) -> list[str]:
    found = sorted(str(path) for path in shards.glob("shard-*.tar"))
    assert len(found) == 4
    return found


def assert_original(samples: list[tuple[bytes, dict]]) -> None:
    """(image bytes, .json) of every sample: each image of the pool once, with its own bytes."""
    assert {about["key"]: content for content, about in samples} == images()
    assert len(samples) == len(images())


def test_webdataset(shards):
    samples = list(webdataset.WebDataset(urls(shards), shardshuffle=False))
    assert {frozenset(sample) for sample in samples} == {frozenset(MEMBERS | {"__key__", "__url__", "__local_path__"})}
    assert_original([(sample["jpeg"], json.loads(sample["json"])) for sample in samples])
    decoded = list(webdataset.WebDataset(urls(shards), shardshuffle=False).decode("pil"))
    assert [sample["jpeg"].size for sample in decoded] == [(96, 72)] * len(samples)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by", ["files", "folder"])
def test_hugging_face_datasets(shards, datasets, streaming, by):
    if by == "files":
        found = datasets.load_dataset("webdataset", data_files=urls(shards), streaming=streaming)
    else:
        found = datasets.load_dataset(str(shards), streaming=streaming)
    train = found["train"]
    assert set(train.features) == MEMBERS | {"__key__", "__url__"}
    assert sorted(sample["json"]["key"] for sample in train) == sorted(images())
    for sample in train:
        assert sample["jpeg"].size == (96, 72)
        assert sample["jpeg"].format in (None, sample["json"]["format"])
    raw = train.cast_column("jpeg", datasets.Image(decode=False))
    assert_original([(sample["jpeg"]["bytes"], sample["json"]) for sample in raw])


def test_ray(shards):
    import ray

    rows = ray.data.read_webdataset(urls(shards)).take_all()
    assert {frozenset(row) for row in rows} == {frozenset(MEMBERS | {"__key__", "__url__"})}
    assert_original([(row["jpeg"], row["json"]) for row in rows])


def test_our_trainer(shards):
    table = read_table(str(shards.parent), ImageLimits())
    reader = ShardReader(table)
    contents = [reader.read(row) for row in range(len(table))]
    assert sorted(contents) == sorted(images().values())
    assert not table.refused
    assert all(open_image(content).decode().shape == (72, 96, 3) for content in contents)
    assert read_table(f"{shards}/*.tar", ImageLimits()).fingerprint() == table.fingerprint()  # with and without index


@pytest.mark.parametrize("asked", [lambda s: str(s.parent), str, lambda s: f"{s}/*.tar"], ids=["run", "shards", "glob"])
def test_our_own_sources(shards, asked):
    samples = [s for part in find_parts([asked(shards)]) for s in read_samples(part, 1 << 20)]
    assert_original([(s.content, json.loads(s.metadata)) for s in samples])
    assert all({m.suffix for m in s.others} == MEMBERS - {"jpeg"} for s in samples)


def test_every_sample_says_the_same_things_and_what_it_really_is(shards):
    for sample in webdataset.WebDataset(urls(shards), shardshuffle=False):
        about = json.loads(sample["json"])
        assert {name: type(value) for name, value in about.items()} == {name: type(v) for name, v in ABOUT.items()}
        assert about["draws"] == {"balance": 1}
        with Image.open(io.BytesIO(sample["jpeg"])) as image:
            assert about["format"] == image.format
            assert (about["width"], about["height"]) == image.size
        assert about["format"] == FORMATS[next(iter(pool()[about["key"]]))]


def test_nothing_that_stood_beside_an_image_is_lost(shards):
    for sample in webdataset.WebDataset(urls(shards), shardshuffle=False):
        about = json.loads(sample["json"])
        found = sorted(unpack_others(sample["others.tar"]).values())
        if about["text_encoding"]:
            found.append(sample["txt"].decode().encode(about["text_encoding"]))
        if about["label_text"]:
            found.append(about["label_text"].encode())
        if about["original"]:
            found.append(about["original"].encode())
        assert sorted(found) == sorted(list(pool()[about["key"]].values())[1:]), about["key"]


def test_labels_captions_and_metadata_stand_where_they_are_looked_for(shards):
    samples = {json.loads(s["json"])["key"]: s for s in webdataset.WebDataset(urls(shards), shardshuffle=False)}
    keys = list(pool())
    assert [samples[key]["cls"] for key in keys[:10]] == [b"-1"] * 3 + [b"7"] + [b"-1"] * 4 + [b"-3", b"-1"]
    assert samples[keys[2]]["txt"].decode() == "café"
    assert samples[keys[5]]["txt"].decode() == "猫"
    assert original(json.loads(samples[keys[0]]["json"])) == {"url": "https://example.org/1", "score": 1, "tags": None}
    assert original(json.loads(samples[keys[8]]["json"])) == {"b": 2}
    assert original(json.loads(samples[keys[1]]["json"])) is None


@pytest.mark.parametrize("content", [b"", b"plain", "é猫".encode(), b"\xff\xfe\x00", bytes(range(256)), b"a\0b"])
def test_every_byte_of_a_caption_can_be_had_back(content):
    text, encoding = read_text(content)
    assert text.encode(encoding) == content
    assert text.encode("utf-8").decode("utf-8") == text


@pytest.mark.parametrize(
    ("text", "label"),
    [("5", 5), (" 5\n", 5), ("-1", -1), ("", -1), ("cat", -1), ("5.0", -1), ("٣", -1), ("9" * 30, -1), ("1_0", -1)],
)
def test_a_label_is_an_integer_or_minus_one(text, label):
    assert read_label(text) == label


def test_the_layout_seen_in_columns_is_that_of_the_samples_one_by_one():
    """find_layout looks at whole columns; a sample must never have a member that the layout has no place for."""
    import pyarrow as pa

    from curation.engine.store import INDEX_SCHEMA

    rng = np.random.default_rng(0)
    suffixes = ["json", "JSON", "txt", "Txt", "cls", "seg.png", ""]
    for _ in range(300):
        rows = []
        for _ in range(int(rng.integers(1, 4))):
            names = rng.choice(suffixes, int(rng.integers(0, 4)))
            sizes = rng.choice([0, 10, 100, 2 << 20, 5 << 20], len(names))
            others = [
                {"suffix": s, "name": s, "offset": 0, "size": z} for s, z in zip(names, sizes.tolist(), strict=True)
            ]
            is_object = any(s.lower() == "json" for s in names) and bool(rng.integers(2))
            rows.append({"others": others, "metadata": "{}" if is_object else None})
        schema = pa.schema([INDEX_SCHEMA.field("others"), INDEX_SCHEMA.field("metadata")])
        layout = find_layout([pa.Table.from_pylist(rows, schema)], ["balance"], 3 << 20)
        for row in rows:
            members = row["others"]
            has = row["metadata"] is not None
            roles = assign_roles([m["suffix"] for m in members], [m["size"] for m in members], has, 3 << 20)
            assert layout.has_others or not roles.carried
            assert layout.has_label or roles.label is None
            used = [*roles.carried, *roles.left_out, *(r for r in (roles.text, roles.label) if r is not None)]
            assert len(set(used)) == len(used) == len(members) - has


def test_members_larger_than_a_shard_stay_where_they_are(tmp_path):
    from curation.stages.balance import BalanceConfig
    from curation.stages.shard import ShardConfig
    from tests.conftest import encoded, picture
    from tests.tiny_run import curate, write_tar

    samples = {f"k{i}": {"jpg": encoded(picture(i)), "mp4": bytes(300_000 if i else 10)} for i in range(3)}
    url = write_tar(tmp_path / "pool.tar", samples)
    curate(tmp_path / "run", url, balance=BalanceConfig(num_images=3), filters=[], shard=ShardConfig(max_mb=0.1))
    for path in (tmp_path / "run/shards").glob("*.tar"):
        assert path.stat().st_size < 100_000
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            about = json.loads(sample["json"])
            assert about["left_out"] == ("" if about["key"] == "k0" else f'["{about["key"]}.mp4"]')
            assert bool(sample["others.tar"]) == (about["key"] == "k0")


def test_keys_that_collide_once_made_safe_do_not(tmp_path):
    """`a b` becomes `a_b_g0`, which another image has as its own key; and both are in one tar."""
    from curation.stages.balance import BalanceConfig
    from tests.conftest import encoded, picture
    from tests.tiny_run import curate, write_tar

    samples = {key: {"jpg": encoded(picture(i))} for i, key in enumerate(["a b", "a_b_g0", "a_b_g1", "a-b"])}
    url = write_tar(tmp_path / "pool.tar", samples)
    curate(tmp_path / "run", url, balance=BalanceConfig(num_images=4), filters=[])
    with tarfile.open(tmp_path / "run/shards/shard-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith("jpeg")]
    assert sorted(names) == ["a-b.jpeg", "a_b_g0.jpeg", "a_b_g0_g1.jpeg", "a_b_g1_g2.jpeg"]
