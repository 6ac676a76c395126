"""Evaluations of patches, against torchmetrics and torchvision; sets of pictures with maps, in every form."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pretrain.data.decode import Damaged
from pretrain.downstream.evals.baselines import Colours, Pixels, as_they_are
from pretrain.downstream.evals.dense import depth, discovery, segmentation
from pretrain.downstream.evals.dense.head import LinearHead, nearest, resized
from pretrain.downstream.evals.dense.pairs import decode_map, pairs
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import LeftOut
from pretrain.downstream.evals.sets import DepthSet, ObjectSet, SegmentationSet
from tests.conftest import encoded, write_tar

CPU = torch.device("cpu")
PALETTE = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def frozen(tokens: torch.nn.Module) -> Frozen:
    return Frozen(tokens=tokens, image=as_they_are(32), device=CPU)


def png(array: np.ndarray) -> bytes:
    return encoded(Image.fromarray(array), "PNG")


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture [64, 96, 3] in fields of 16 px, each of the colour of its class, and the classes [64, 96]."""
    generator = np.random.default_rng(seed)
    classes = np.kron(generator.integers(0, 3, (4, 6)), np.ones((16, 16), np.int64)).astype(np.uint8)
    noise = generator.normal(0, 20, (64, 96, 3))
    return (PALETTE[classes] + noise).clip(0, 255).astype(np.uint8), classes


def scenes(path: Path, seeds: range, change: dict[int, int] | None = None) -> str:
    members = []
    for seed in seeds:
        image, classes = scene(seed)
        for old, new in (change or {}).items():
            classes = np.where(classes == old, new, classes).astype(np.uint8)
        members += [(f"s{seed:02d}.png", png(image)), (f"s{seed:02d}.seg.png", png(classes))]
    return str(write_tar(path, members))


def test_mean_iou_is_that_of_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = np.random.default_rng(0)
    truth, answer = generator.integers(-1, 5, (3, 20, 30)), generator.integers(0, 5, (3, 20, 30))
    counts = sum(segmentation.confusion(a, t, 5) for a, t in zip(answer, truth, strict=True))
    theirs = MulticlassJaccardIndex(5, ignore_index=-1, average="macro")
    expected = theirs(torch.from_numpy(answer), torch.from_numpy(truth))
    assert segmentation.mean_iou(counts) == pytest.approx(float(expected))


def test_a_class_that_is_nowhere_does_not_count() -> None:
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    found = segmentation.intersection_over_union(counts)
    assert found[:2].tolist() == [0.75, 0.8]
    assert np.isnan(found[2])
    assert segmentation.mean_iou(counts) == pytest.approx(0.775)


def test_classes_of_their_own_colour_are_told_apart(tmp_path: Path) -> None:
    data = SegmentationSet(
        train=scenes(tmp_path / "train.tar", range(8)),
        val=scenes(tmp_path / "val.tar", range(20, 25)),
        classes=3,
        px=64,
    )
    found = segmentation.run(
        frozen(Colours()), data, segmentation.SegmentationConfig(epochs=1, least_steps=40, batch_size=4, rate=1e-2)
    )
    assert found.value > 0.75  # bilinear edges between fields cost the rest
    assert found.figures["accuracy of pixels"] > 0.85
    assert found.images == {"train": 8, "val": 5}
    assert 0 < found.standard_error < 0.05


def test_ignored_pixels_teach_and_count_nothing(tmp_path: Path) -> None:
    train = scenes(tmp_path / "train.tar", range(8), {2: 255})
    data = SegmentationSet(train=train, val=scenes(tmp_path / "val.tar", range(20, 23), {2: 255}), classes=2, px=64)
    config = segmentation.SegmentationConfig(epochs=1, least_steps=40, batch_size=4, rate=1e-2)
    found = segmentation.run(frozen(Colours()), data, config)
    assert found.value > 0.85
    wrong = SegmentationSet(train=train, val=data.val, classes=2, ignore=[254], px=64)
    with pytest.raises(ValueError, match=r"has the number 255: classes=2 are numbered 0 to 1, and ignore=\[254\]"):
        segmentation.run(frozen(Colours()), wrong, config)
    with pytest.raises(ValueError, match=r"about 8 pictures, take about 1.8e-05 GB, more than memory_gb=1e-06"):
        segmentation.run(frozen(Colours()), data, segmentation.SegmentationConfig(memory_gb=1e-6))
    with pytest.raises(ValueError, match="has 1, which is one of the classes 0 to 1"):
        SegmentationSet(train=train, val=train, classes=2, ignore=[1])


def test_the_first_class_may_be_one(tmp_path: Path) -> None:
    change = {2: 3, 1: 2, 0: 1}
    train, val = (scenes(tmp_path / f"{n}.tar", seeds, change) for n, seeds in ((0, range(8)), (1, range(20, 23))))
    data = SegmentationSet(train=train, val=val, classes=3, first=1, ignore=[0], px=64)
    found = segmentation.run(
        frozen(Colours()), data, segmentation.SegmentationConfig(epochs=1, least_steps=40, batch_size=4, rate=1e-2)
    )
    assert found.value > 0.7
    assert "IoU of class 3" in found.figures


def test_a_map_is_taken_at_the_middle_of_pixels() -> None:
    numbers = np.arange(24).reshape(4, 6)
    assert np.array_equal(nearest(numbers, (4, 6)), numbers)
    assert nearest(numbers, (2, 3)).tolist() == [[7, 9, 11], [19, 21, 23]]
    assert nearest(numbers, (8, 12))[::2, ::2].tolist() == numbers.tolist()


def test_the_head_keeps_each_pictures_patches_together() -> None:
    head = LinearHead(5, 3, seed=0).eval()
    ones, other = torch.randn(2, 2, 3, 5), torch.randn(1, 4, 1, 5)
    together = head([ones, other])
    assert [tuple(scores.shape) for scores in together] == [(2, 3, 2, 3), (1, 3, 4, 1)]
    torch.testing.assert_close(together[1], head([other])[0])
    expected = head.linear(head.norm(ones[1].flatten(0, 1)))[4]  # second row, second column
    torch.testing.assert_close(together[0][1, :, 1, 1], expected)
    assert resized(together[0], (8, 12)).shape == (2, 3, 8, 12)


def test_depth_is_the_mean_of_bins_by_their_shares() -> None:
    scores = torch.full((256, 1, 1), -3.0)
    scores[100] = 1000.0
    bins = torch.linspace(0.5, 8, 256)
    expected = (bins * 0.1).sum() + bins[100] * 1000
    torch.testing.assert_close(depth.depth_of(scores, 0.5, 8)[0, 0], expected / (0.1 * 256 + 1000))
    assert depth.depth_of(torch.zeros(256, 1, 1), 0.5, 8)[0, 0] == pytest.approx(4.25)


def test_a_constant_factor_costs_little_and_errors_are_those_of_torchmetrics() -> None:
    from torchmetrics.functional import mean_squared_error

    truth = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 5 + 0.5
    assert depth.scale_invariant_loss(truth, truth) == pytest.approx(1e-6)
    factor = depth.scale_invariant_loss(truth * np.e, truth)
    assert factor == pytest.approx(0.15**0.5, abs=1e-5)
    answer = truth * (1 + 0.3 * torch.randn(100, generator=torch.Generator().manual_seed(1))).clamp(min=0.2)
    found = depth.errors(answer.numpy(), truth.numpy())
    assert found["RMSE"] == pytest.approx(float(mean_squared_error(answer, truth, squared=False)))
    within = torch.maximum(answer / truth, truth / answer) < 1.25
    assert found["delta 1"] == pytest.approx(float(within.float().mean()))


def deep(path: Path, seeds: range, unknown: bool = False) -> str:
    """The brighter, the nearer: metres = 1 + 3 x (255 - value) / 255, in millimetres."""
    members = []
    for seed in seeds:
        values = np.kron(np.random.default_rng(seed).integers(0, 256, (4, 6)), np.ones((16, 16))).astype(np.uint8)
        metres = 1 + 3 * (255.0 - values) / 255
        millimetres = (metres * 1000).astype(np.uint16)
        millimetres[:8] = 0
        if unknown:
            millimetres[:] = 0
        members += [(f"d{seed}.png", png(np.repeat(values[..., None], 3, 2)))]
        members += [(f"d{seed}.depth.png", png(millimetres))]
    return str(write_tar(path, members))


def test_depth_that_can_be_seen_is_learned(tmp_path: Path) -> None:
    train, val = deep(tmp_path / "t.tar", range(8)), deep(tmp_path / "v.tar", range(20, 24))
    data = DepthSet(train=train, val=val, max_m=5, px=64)
    config = depth.DepthConfig(epochs=1, least_steps=60, batch_size=4, rate=0.1)
    found = depth.run(frozen(Pixels()), data, config)
    assert found.value < 0.6  # 0.87 is the deviation of the depths, and edges between fields are soft
    assert found.figures["delta 1"] > 0.65
    nothing = DepthSet(train=data.train, val=deep(tmp_path / "n.tar", range(2), unknown=True), px=64)
    with pytest.raises(ValueError, match="has no distance between min_m"):
        depth.run(frozen(Pixels()), nothing, config)
    with pytest.raises(ValueError, match="min_m=3 must be below max_m=2"):
        DepthSet(train="x", val="x", min_m=3, max_m=2)


def test_boxes_overlap_as_in_torchvision() -> None:
    from torchvision.ops import box_iou

    corners = np.random.default_rng(0).integers(0, 50, (30, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1).astype(float)
    theirs = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes))
    ours = [[discovery.overlap(tuple(a), tuple(b)) for b in boxes] for a in boxes]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_what_differs_from_the_rest_is_the_object() -> None:
    patches = np.random.default_rng(0).normal(0, 0.1, (8, 10, 6))
    patches[..., 0] += 1
    patches[2:5, 3:7, 0] -= 2
    patches[7, 9, 0] -= 2  # alike, but apart: not of the box
    assert discovery.object_box(patches, 0.2) == (3, 2, 7, 5)


def test_segments_at_the_borders_are_no_objects() -> None:
    segments = np.zeros((20, 20), np.int64)
    segments[5:10, 4:12] = 1
    segments[0:6, 14:18] = 2  # touches one side
    segments[18:, 18:] = 3  # two sides, and small
    segments[12, 12] = 4  # too small
    assert discovery.boxes_of_segments(segments, 0.02) == [(4, 5, 12, 10), (14, 0, 18, 6)]


def squares(path: Path, boxes_in: str) -> str:
    members = []
    for n in range(6):
        left, top = 16 * (n % 3 + 1), 16 * (n % 2 + 1)
        image = np.random.default_rng(n).normal(60, 8, (80, 112, 3))
        image[top : top + 32, left : left + 48] = (220, 200, 40)
        members.append((f"q{n}.png", png(image.clip(0, 255).astype(np.uint8))))
        if boxes_in == "json":
            boxes = json.dumps({"boxes": [[left, top, left + 48, top + 32]]}).encode()
            members.append((f"q{n}.json", boxes))
        elif boxes_in == "segments":
            segments = np.zeros((80, 112), np.uint8)
            segments[top : top + 32, left : left + 48] = 7
            members.append((f"q{n}.seg.png", png(segments)))
    return str(write_tar(path, members))


@pytest.mark.parametrize("boxes_in", ["json", "segments"])
def test_bright_squares_are_found(boxes_in: str, tmp_path: Path) -> None:
    data = ObjectSet(val=squares(tmp_path / "q.tar", boxes_in), px=80)
    found = discovery.run(frozen(Colours()), data, discovery.DiscoveryConfig())
    assert found.value == 1.0
    assert found.figures["mean overlap"] == 1.0
    assert found.images == {"val": 6, "without an object": 0}


def test_pictures_without_objects_are_said(tmp_path: Path) -> None:
    data = ObjectSet(val=squares(tmp_path / "q.tar", "nowhere"), px=80)
    with pytest.raises(ValueError, match=r"no picture of .* has an object"):
        discovery.run(frozen(Colours()), data, discovery.DiscoveryConfig())
    members = [("a.png", png(scene(0)[0])), ("a.json", b'{"boxes": [[5, 5, 5, 9]]}')]
    wrong = ObjectSet(val=str(write_tar(tmp_path / "w.tar", members)), px=80)
    with pytest.raises(ValueError, match="a box of a has no inside"):
        discovery.run(frozen(Colours()), wrong, discovery.DiscoveryConfig())


def test_maps_come_from_a_second_folder_or_a_column(tmp_path: Path) -> None:
    for name in ("images", "maps"):
        (tmp_path / name).mkdir()
    rows = []
    for seed in range(3):
        image, classes = scene(seed)
        (tmp_path / "images" / f"s{seed}.png").write_bytes(png(image))
        (tmp_path / "maps" / f"s{seed}.png").write_bytes(png(classes))
        rows.append({"key": f"s{seed}", "image": png(image), "annotation": png(classes)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    table = str(tmp_path / "set.parquet")
    for pattern, maps in ((f"{tmp_path}/images", f"{tmp_path}/maps"), (table, f"{table}:annotation")):
        left_out = LeftOut()
        found = list(pairs(pattern, maps, "seg", 64, 16, left_out))
        assert [one.key for one in found] == ["s0", "s1", "s2"]
        assert all(np.array_equal(one.truth, scene(n)[1]) for n, one in enumerate(found))
        assert found[0].picture.shape == (64, 96, 3)
        assert (left_out.images, len(left_out)) == (3, 0)
    (tmp_path / "maps" / "s1.png").unlink()
    with pytest.raises(ValueError, match="has s2 where the pictures have s1: both need the same keys"):
        list(pairs(f"{tmp_path}/images", f"{tmp_path}/maps", "seg", 64, 16, LeftOut()))


def test_what_has_no_map_is_left_out_and_named(tmp_path: Path) -> None:
    image, classes = scene(0)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    members = [("a.png", png(image)), ("a.seg.png", png(classes)), ("b.png", png(image))]
    members += [("c.png", png(image)), ("c.seg.png", buffer.getvalue()), ("d.png", png(image)), ("d.seg.png", b"no")]
    left_out = LeftOut()
    found = list(pairs(str(write_tar(tmp_path / "s.tar", members)), "", "seg", 64, 16, left_out))
    assert [one.key for one in found] == ["a"]
    assert left_out.names == ["b (no seg map)", "c (not_a_map)", "d (damaged_map)"]


def test_palettes_are_numbers() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="L").convert("P")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    image = Image.frombytes("P", (2, 2), bytes([0, 1, 2, 1]))
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    assert decode_map(encoded(image, "PNG")).tolist() == [[0, 1], [2, 1]]
    with pytest.raises(Damaged):
        decode_map(encoded(Image.new("RGB", (2, 2)), "PNG"))
    sixteen = Image.fromarray(np.array([[40000, 1]], np.uint16))
    assert decode_map(encoded(sixteen, "PNG")).tolist() == [[40000, 1]]
