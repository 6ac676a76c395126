"""The demo pool: the same bytes every time, and a truth that the bytes bear out."""

import csv
import hashlib
import io
import json
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from curation.demo.copies import EDITS, copy_of
from curation.demo.drawing import JUNK, SCENES, draw_junk, draw_scene
from curation.demo.pool import CONCEPTS, DemoPaths, apportion, draw_picture, make_demo, plan_pool
from curation.reading.pictures import images

NUM_IMAGES = 120
IMAGE_SUFFIXES = ("jpg", "png", "webp", "gif")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> DemoPaths:
    return make_demo(tmp_path_factory.mktemp("demo"), seed=3, num_images=NUM_IMAGES)


@pytest.fixture(scope="module")
def truth(demo) -> list[dict[str, str]]:
    with demo.truth.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pool(demo) -> dict[str, dict[str, bytes]]:
    return samples(demo.pool)


def samples(pattern: str) -> dict[str, dict[str, bytes]]:
    """Members by key and suffix, in the order of the tars."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
        with tarfile.open(path) as tar:
            for entry in tar:
                key, suffix = entry.name.split(".", 1)
                assert suffix not in found.setdefault(key, {})
                found[key][suffix] = tar.extractfile(entry).read()
    return found


def image_member(members: dict[str, bytes]) -> bytes | None:
    return next((data for suffix, data in members.items() if suffix in IMAGE_SUFFIXES), None)


def decode(data: bytes) -> Image.Image:
    """As a tolerant reader shows it: the first frame, upright, 8-bit RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # damaged EXIF and palettes with alpha are meant
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path):
    again = make_demo(tmp_path, seed=3, num_images=NUM_IMAGES)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / file).read_bytes() == (demo.truth.parent / file).read_bytes(), file
    tar = tmp_path / "pool" / "pool-0000.tar"
    before = tar.stat().st_mtime_ns
    assert make_demo(tmp_path, seed=3, num_images=NUM_IMAGES) == again
    assert tar.stat().st_mtime_ns == before  # what is finished is left alone


def test_a_picture_does_not_depend_on_the_pool_around_it():
    assert draw_picture(5, 17, "natural", "fish") == draw_picture(5, 17, "natural", "fish")
    assert draw_picture(5, 17, "natural", "fish") != draw_picture(6, 17, "natural", "fish")
    assert draw_picture(5, 17, "natural", "fish") != draw_picture(5, 18, "natural", "fish")


def test_truth_has_a_row_for_every_sample(truth, pool):
    assert [row["key"] for row in truth] == list(pool)
    assert len(pool) == NUM_IMAGES
    for row in truth:
        data = image_member(pool[row["key"]])
        assert row["sha256"] == ("" if data is None else hashlib.sha256(data).hexdigest())


def test_clusters_name_originals_and_exact_copies_are_exact(truth):
    by_key = {row["key"]: row for row in truth}
    copies = [row for row in truth if row["duplicate_of"]]
    assert len(copies) == round(0.15 * NUM_IMAGES)
    for row in copies:
        original = by_key[row["duplicate_of"]]
        assert original["cluster"] == row["cluster"] == original["key"]
        assert not original["duplicate_of"]
        assert not original["transform"]
        assert (row["kind"], row["label"]) == (original["kind"], original["label"])
        assert (row["sha256"] == original["sha256"]) == (row["transform"] == "exact")
    sizes = Counter(row["cluster"] for row in truth if row["cluster"])
    assert min(sizes.values()) >= 2
    assert sum(sizes.values()) == len(copies) + len(sizes)


def test_leaks_copy_evaluation_pictures(demo, truth):
    evaluation = {key: image_member(members) for key, members in samples(demo.evaluation).items()}
    leaks = [row for row in truth if row["leak_of"]]
    assert {row["transform"] == "exact" for row in leaks} == {True, False}
    for row in leaks:
        same = hashlib.sha256(evaluation[row["leak_of"]]).hexdigest() == row["sha256"]
        assert same == (row["transform"] == "exact")
    assert len({row["leak_of"] for row in leaks}) == len(leaks)


def test_labels_stay_out_of_the_pool(demo, pool):
    for members in pool.values():
        if "json" in members:
            assert b'"label"' not in members["json"]
    for pattern, concepts in (
        (demo.evaluation, set(CONCEPTS)),
        (demo.labelled, set(CONCEPTS)),
        (demo.seed, {c for c, shown in CONCEPTS.items() if shown}),
    ):
        labels = {json.loads(members["json"])["label"] for members in samples(pattern).values()}
        assert labels == concepts
    in_pool = {hashlib.sha256(data).hexdigest() for data in map(image_member, pool.values()) if data is not None}
    for pattern in (demo.seed, demo.labelled):
        apart = {hashlib.sha256(image_member(members)).hexdigest() for members in samples(pattern).values()}
        assert not in_pool & apart


def test_every_file_decodes_as_expected(truth, pool):
    for row in truth:
        data = image_member(pool[row["key"]])
        if row["expect"] == "reject_no_alloc":
            assert images.decode(data, images.ImageLimits()).reason == "too_many_pixels"
        elif row["expect"] == "reject":
            if data is not None:
                with pytest.raises((OSError, SyntaxError)):
                    decode(data)
        elif row["expect"] == "ok_or_reject" and row["defect"] == "bit_flips":
            assert data is not None  # decoders differ
        else:
            image = decode(data)
            assert (str(image.width), str(image.height)) == (row["width"], row["height"]), row
            if row["mean_luma"]:
                assert np.asarray(image.convert("L")).mean() == pytest.approx(float(row["mean_luma"]), abs=3), row


def test_damage_is_of_every_sort(truth, pool):
    defects = {row["defect"]: row for row in truth if row["defect"]}
    assert len(defects) == sum(row["kind"] == "damaged" for row in truth) == 49
    assert {row["expect"] for row in defects.values()} == {
        "ok",
        "ok_convert",
        "ok_first_frame",
        "ok_rotate",
        "ok_filter",
        "ok_or_reject",
        "reject",
        "reject_no_alloc",
    }
    assert len(pool[defects["bomb_header"]["key"]]["png"]) < 200
    assert set(pool[defects["json_missing"]["key"]]) == {"jpg"}
    assert set(pool[defects["text_only"]["key"]]) == {"txt"}
    assert not defects["unicode_key"]["key"].isascii()
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(pool[defects["json_broken"]["key"]]["json"])


def test_the_default_pool_is_planned_as_described():
    plan = plan_pool(0, 3000, 200)
    assert len({sample.key for sample in plan}) == 3000
    assert [sample.shard for sample in plan[499:501]] == ["pool-0000.tar", "pool-0001.tar"]
    transforms = Counter(sample.transform for sample in plan if sample.original is not None)
    assert set(transforms) == {*EDITS, "exact"}
    assert transforms.total() == 450
    sizes = Counter(sample.cluster for sample in plan if sample.cluster).values()
    assert max(sizes) == 8
    assert sum(size == 2 for size in sizes) > len(sizes) / 2
    labels = Counter(s.label for s in plan if s.kind == "natural" and s.original is None and not s.leak_of)
    assert [label for label, _ in labels.most_common()] == list(CONCEPTS)  # the long tail
    assert labels["house"] > 6 * labels["fruit"]
    assert 0.6 <= sum(CONCEPTS.values()) / len(CONCEPTS) <= 0.7
    assert {sample.kind for sample in plan if sample.is_junk} == set(JUNK)


@pytest.mark.parametrize("transform", [*EDITS, "exact"])
def test_an_edit_keeps_the_picture_recognisable(transform):
    """Straight or mirrored, a copy is nearer to its original at 24 x 24 pixels than another picture of the concept."""
    data, _ = draw_picture(0, 1, "natural", "house")
    copy, _, _ = copy_of(np.random.default_rng(1), data, transform)

    def thumbnail(raw: bytes) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(raw)).convert("L").resize((24, 24), Image.Resampling.BOX), np.float64)
        return (pixels - pixels.mean()) / pixels.std()

    other = thumbnail(draw_picture(0, 2, "natural", "house")[0])
    original, edited = thumbnail(data), thumbnail(copy)
    alike = max((original * edited).mean(), (original[:, ::-1] * edited).mean())
    assert alike > 0.6
    assert alike > (original * other).mean() + 0.1


def test_every_drawing_fills_any_size():
    rng = np.random.default_rng(0)
    for size in ((64, 96), (320, 180), (97, 61)):
        for concept in SCENES:
            image = draw_scene(concept, rng, *size)
            assert image.size == size
            assert np.asarray(image).std() > 4, concept
        for kind in JUNK:
            assert draw_junk(kind, rng, *size).size == size


def test_shares_are_apportioned_to_within_one():
    assert Counter(apportion({"a": 3.0, "b": 2.0, "c": 1.0}, 7)) == {"a": 4, "b": 2, "c": 1}
    assert apportion({"a": 1.0, "b": 1.0}, 0) == []


def test_too_small_a_pool_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 100"):
        make_demo(tmp_path, num_images=50)
