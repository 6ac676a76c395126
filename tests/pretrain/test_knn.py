"""k-NN: votes against a loop in float64, an independent library, invariances, the readers, and the published floors."""

import io
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.checkpoint import write_teacher
from pretrain.data.decode import open_image
from pretrain.downstream.evals.__main__ import main
from pretrain.downstream.evals.baselines import Pixels, as_they_are, pixel_features, random_like
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import batches, samples
from pretrain.downstream.evals.pooled.knn import KnnConfig, knn_accuracy, nearest, run, votes
from pretrain.downstream.evals.result import Result
from pretrain.downstream.evals.sets import LabelledSet
from pretrain.downstream.pixels import eval_crop, find_sets
from pretrain.models.architectures import build
from tests.conftest import encoded, picture, write_tar

CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "fox"]
PIXELS = Frozen(tokens=Pixels(), image=as_they_are(224), device=CPU)


def of_pixels(k: list[int], temperature: float = 0.07, **sets: str | int) -> Result:
    PIXELS.forget()
    return run(PIXELS, LabelledSet(**sets), KnnConfig(k=k, temperature=temperature))


def command(train: str, val: str, px: int, k: int) -> list[str]:
    return ["knn", "pixels", f"knn.k=[{k}]", "--px", str(px), "--data", f"train={train}", f"val={val}"]


def clusters(count: int, spread: float, seed: int, width: int = 24) -> tuple[Tensor, list[str]]:
    """Rows around three fixed directions."""
    centres = F.normalize(torch.randn(3, width, generator=torch.Generator().manual_seed(7)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(3, (count,), generator=generator)
    rows = centres[numbers] + spread * torch.randn(count, width, generator=generator)
    return rows, [CLASSES[n] for n in numbers]


def slow_accuracy(
    train: Tensor, train_labels: list[str], val: Tensor, val_labels: list[str], k: int, temperature: float
) -> float:
    bank = train.double().numpy() / np.linalg.norm(train.double().numpy(), axis=1, keepdims=True)
    correct = 0
    for row, truth in zip(val.double().numpy(), val_labels, strict=True):
        cosine = bank @ (row / np.linalg.norm(row))
        votes = dict.fromkeys(CLASSES, 0.0)
        for n in np.argsort(-cosine)[:k]:
            votes[train_labels[n]] += math.exp(cosine[n] / temperature)
        correct += max(votes, key=lambda name: votes[name]) == truth
    return correct / len(val)


def test_votes_of_a_case_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    found = votes(*nearest(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1, 1, 2]), 3), 3, [1, 3], 0.5)
    assert found[1].tolist() == [[1, 0, 0]]  # relative to the nearest, whose weight is 1
    expected = [1, math.exp(-0.2 / 0.5) + math.exp(-1 / 0.5), 0]
    torch.testing.assert_close(found[3][0], torch.tensor(expected))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_accuracy_equals_a_loop_in_float64(temperature: float) -> None:
    train, val = clusters(300, 0.35, 1), clusters(150, 0.35, 2)
    fast = knn_accuracy(*train, *val, [1, 10, 100], temperature)
    assert 0.5 < fast[10] < 1
    for k, accuracy in fast.items():
        assert accuracy == slow_accuracy(*train, *val, k, temperature)


def test_one_neighbour_and_many_agree_with_an_independent_library() -> None:
    from scipy.spatial.distance import cdist

    train, val = clusters(200, 0.5, 3), clusters(100, 0.5, 4)
    nearest = cdist(val[0].numpy(), train[0].numpy(), "cosine").argmin(axis=1)
    expected = np.mean([train[1][n] == label for n, label in zip(nearest, val[1], strict=True)])
    assert knn_accuracy(*train, *val, [1], 0.07)[1] == expected


def test_accuracy_does_not_depend_on_order_or_length_of_rows() -> None:
    train, val = clusters(300, 0.35, 1), clusters(700, 0.35, 2)  # 700: more than one block of rows
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = train[0][order] * torch.rand(300, 1).add(0.5), [train[1][n] for n in order]
    assert knn_accuracy(*train, *val, [10], 0.07) == knn_accuracy(*shuffled, *val, [10], 0.07)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    train, val = clusters(10, 0.1, 1), clusters(5, 0.1, 2)
    with pytest.raises(ValueError, match="k=20 neighbours asked for, but the training set has 10"):
        knn_accuracy(*train, *val, [20], 0.07)
    with pytest.raises(ValueError, match="found 0 that vote"):
        knn_accuracy(train[0][:0], [], *val, [1], 0.07)
    with pytest.raises(ValueError, match="no class of the validation set"):
        knn_accuracy(*train, val[0], ["owl", "elk"] * 2 + ["owl"], [1], 0.07)
    with pytest.raises(ValueError, match="resize_px=16 is smaller"):
        LabelledSet(train="x", val="x", px=32, resize_px=16)
    with pytest.raises(ValueError, match=r"knn\.k=\[\] must be one or more"):
        KnnConfig(k=[])
    with pytest.raises(ValueError, match="all images of the training set have the label 'cat'"):
        knn_accuracy(train[0], ["cat"] * 10, *val, [1], 0.07)
    with pytest.raises(ValueError, match="all images of the validation set have the label 'dog'"):
        knn_accuracy(*train, val[0], ["dog"] * 5, [1], 0.07)
    with pytest.raises(ValueError, match="two images or more on both sides, found 10 that vote and 1"):
        knn_accuracy(*train, val[0][:1], ["dog"], [1], 0.07)
    with pytest.raises(ValueError, match=r"nothing found at '.*none-\*\.tar'"):
        find_sets(f"{tmp_path}/none-*.tar")


def labelled_members(n: int) -> list[tuple[str, bytes]]:
    label = json.dumps({"label": CLASSES[n % 3]}).encode()
    return [(f"k{n:03d}.json", label), (f"k{n:03d}.png", encoded(picture(n, (40, 32)), "PNG"))]


def labelled_tar(path: Path, count: int, start: int = 0) -> Path:
    return write_tar(path, [member for n in range(start, start + count) for member in labelled_members(n)])


def test_samples_come_in_order_with_labels_of_json_or_csv(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a-1.tar", 3, 3)
    labelled_tar(tmp_path / "a-0.tar", 3)
    found = list(samples(f"{tmp_path}/a-*.tar"))
    assert [(s.key, s.label) for s in found] == [(f"k{n:03d}", CLASSES[n % 3]) for n in range(6)]
    (tmp_path / "labels.csv").write_text("key,label,more\nk000,owl,1\n")
    assert [s.label for s in samples(str(tmp_path), str(tmp_path / "labels.csv"), max_images=2)] == ["owl", None]


def test_batches_do_not_depend_on_their_size_or_the_threads(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a.tar", 7)
    one = torch.cat([found.images for found in batches(str(tmp_path), 24, 28, 7, num_threads=1)])
    many = list(batches(str(tmp_path), 24, 28, 3, num_threads=3))
    assert [len(found.images) for found in many] == [3, 3, 1]
    assert torch.equal(one, torch.cat([found.images for found in many]))
    assert [key for found in many for key in found.keys] == [f"k{n:03d}" for n in range(7)]
    assert one.shape == (7, 3, 24, 24)


DAMAGED = encoded(picture(0), "PNG")[:-3000]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"no image"), ("a.json", b'{"label": "x"}')], r"\(1 not_an_image\): a \(not_an_image\)"),
        ([("a.png", DAMAGED), ("a.json", b'{"label": "x"}')], r"1 of the 1 images of .* \(1 damaged\)"),
        ([("a.psd", b"8BPS"), ("a.json", b'{"label": "x"}')], r"\(1 unsupported_format\)"),
        ([("a.png", encoded(picture(0), "PNG"))], 'a \\(no label\\).* A label is "label" in the json member'),
        ([("a.png", encoded(picture(0), "PNG")), ("a.json", b"[1]")], "no label"),
        ([("a.png", encoded(picture(0), "PNG")), ("a.json", b'{"label": ""}')], "no label"),
        ([("a.txt", b"a caption")], "holds no image"),
    ],
)
def test_sets_that_say_nothing_fail_by_name(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        list(batches(str(tar), 24, 28, 4))
    good = str(labelled_tar(tmp_path / "good.tar", 6))
    assert main(command(good, str(tar), 24, 1)) == 2
    assert "error: knn of pixels on data: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (range(1), "found 6 that vote and 1 to classify"),
        (range(0, 9, 3), "all images of the validation set have the label 'cat'"),
        (range(4), "k=7 neighbours asked for, but the training set has 6"),
    ],
)
def test_a_figure_that_means_nothing_is_an_error(
    tmp_path: Path, val: range, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = labelled_tar(tmp_path / "train.tar", 6)
    write_tar(tmp_path / "val.tar", [member for n in val for member in labelled_members(n)])
    assert main(command(str(train), f"{tmp_path}/val.tar", 24, 7 if "k=7" in message else 1)) == 2
    assert message in capsys.readouterr().err


def test_a_few_left_out_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One damaged image and one without a label in three hundred: the figure stands, and says so."""
    train = labelled_tar(tmp_path / "train.tar", 6)
    members = [member for n in range(300) for member in labelled_members(n)]
    members[1] = (members[1][0], DAMAGED)
    del members[6]  # a json
    write_tar(tmp_path / "val.tar", members)
    assert main([*command(str(train), f"{tmp_path}/val.tar", 24, 1), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    result = only_result(tmp_path / "out")
    assert result["images"]["val"] == 298
    assert result["left_out"]["val"] == {"images": 2, "first": ["k000 (damaged)", "k003 (no label)"]}
    assert "val: 2 images left out: k000 (damaged), k003 (no label)" in shown.err
    assert "train:" not in shown.err


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    tar = labelled_tar(tmp_path / "a.tar", 9)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        list(batches(str(tar), 24, 28, 4))


@pytest.mark.parametrize("prefix", ["./", "folder.v2/", "./deep/er/"])
def test_names_end_at_the_first_dot_of_their_last_part(tmp_path: Path, prefix: str) -> None:
    """`tar -C folder -cf x.tar .` names members `./a.jpg`: once all images of such a tar were one, with accuracy 0."""
    names = {"train": range(9), "val": range(6)}
    for split, those in names.items():
        members = [(prefix + name, content) for n in those for name, content in labelled_members(n)]
        write_tar(tmp_path / f"{split}.tar", members)
    result = of_pixels([1], train=f"{tmp_path}/train.tar", val=f"{tmp_path}/val.tar", px=24, resize_px=28)
    assert (result.images, result.value) == ({"train": 9, "val": 6}, 1.0)
    key = f"{prefix}k000".removeprefix("./")
    (tmp_path / "labels.csv").write_text(f"key,label\n{key},owl\n")
    first = next(samples(f"{tmp_path}/val.tar", f"{tmp_path}/labels.csv"))
    assert (first.key, first.label) == (key, "owl")


def test_a_tar_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(6):
        for name, content in labelled_members(n):
            (folder / name).write_bytes(content)
    subprocess.run(["tar", "-C", str(folder), "-cf", str(tmp_path / "x.tar"), "."], check=True)
    found = {sample.key: sample.label for sample in samples(str(tmp_path / "x.tar"))}
    assert found == {f"k{n:03d}": CLASSES[n % 3] for n in range(6)}


def test_crop_is_the_centre_of_the_resized_image() -> None:
    image = picture(1, (60, 40))
    expected = np.asarray(image.resize((48, 32), 3))[4:28, 12:36]  # 3: bicubic
    assert np.array_equal(eval_crop(encoded(image, "PNG"), 24, 32), expected)
    same = eval_crop(encoded(picture(2, (32, 32)), "PNG"), 32, 32)
    assert np.array_equal(same, np.asarray(picture(2, (32, 32))))


def turned_jpeg() -> tuple[bytes, np.ndarray]:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(4, (60, 40)), "JPEG", exif=exif, quality=95)
    return content, np.asarray(picture(4, (60, 40)).transpose(Image.Transpose.ROTATE_270))


def transparent_png() -> tuple[bytes, np.ndarray]:
    image = picture(5, (40, 60)).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0], [255]]), 30, 0).repeat(40, 1)))
    expected = np.array(image.convert("RGB"))
    expected[:30] = 255
    return encoded(image, "PNG"), expected


def deep_png() -> tuple[bytes, np.ndarray]:
    gray = np.asarray(picture(6, (40, 60)).convert("L"))
    return encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"), np.repeat(gray[:, :, None], 3, 2)


@pytest.mark.parametrize("made", [turned_jpeg, transparent_png, deep_png])
def test_evaluation_sees_what_training_sees(made: Callable[[], tuple[bytes, np.ndarray]]) -> None:
    """Upright, over white, 16 bits scaled; once it was lying, over black, and white."""
    content, expected = made()
    crop = eval_crop(content, 40, 40).astype(int)
    assert np.array_equal(crop, open_image(content).decode()[10:50])
    assert np.abs(crop - expected[10:50]).mean() < 6  # JPEG halves the colours of a small picture


def test_real_crops_are_those_of_pillow(real_data: Path) -> None:
    """The published preprocessing, bit for bit on 16,260 crops; 1 allows for other versions of the decoder."""
    for sample in samples(f"{real_data}/eval/eval20-val-*.tar", max_images=100):
        assert sample.content is not None
        for px, resize_px in ((96, 110), (32, 32)):
            image = Image.open(io.BytesIO(sample.content))
            image.draft("RGB", (2 * resize_px, 2 * resize_px))
            image = image.convert("RGB")
            scale = resize_px / min(image.size)
            image = image.resize(tuple(max(px, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
            left, top = ((side - px) // 2 for side in image.size)
            expected = np.asarray(image.crop((left, top, left + px, top + px)))
            assert np.abs(eval_crop(sample.content, px, resize_px).astype(int) - expected).max() <= 1


def only_result(out: Path) -> dict:
    (path,) = out.glob("*/*/*/result.json")
    return json.loads(path.read_text())


def test_command_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled_tar(tmp_path / "train.tar", 12)
    labelled_tar(tmp_path / "val.tar", 6, 6)  # among the training images: the nearest is the same
    asked = [*command(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", 32, 1), "resize_px=32"]
    asked[2] = "knn.k=[1,3]"
    assert main([*asked, "--out", f"{tmp_path}/out"]) == 0
    result = only_result(tmp_path / "out")
    assert result["value"] == result["figures"]["k=1"] == 1.0
    assert result["images"] == {"train": 12, "val": 6}
    assert result["figures"]["chance"] == pytest.approx(1 / 3)
    assert "| data | knn: accuracy | 1.000 ± 0.000 |" in capsys.readouterr().out


def test_command_loads_a_trained_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled_tar(tmp_path / "set.tar", 6)
    model = build("dinov3_tiny", depth=1)
    model.init_weights(torch.Generator().manual_seed(0))
    model = random_like(model)  # with layer scales at which images differ
    description = {
        "architecture": "dinov3_tiny",
        "model": {"depth": 1},
        "image": {"mean": [0.5] * 3, "std": [0.25] * 3, "px": 32},
    }
    write_teacher(tmp_path / "teacher", {f"backbone.{k}": v for k, v in model.state_dict().items()}, description)
    tar = str(tmp_path / "set.tar")
    both = [f"{tmp_path}/teacher", f"untrained:{tmp_path}/teacher"]
    assert (
        main(["knn", *both, "knn.k=[1]", "--data", f"train={tar}", f"val={tar}", "--out", str(tmp_path / "out")]) == 0
    )
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/*/*/result.json")]
    assert {result["backbone"] for result in results} == set(both)
    for result in results:
        assert result["value"] == 1.0  # each image is its own neighbour
        assert result["px"] == 32
    assert capsys.readouterr().out.count("1.000 ± 0.000") == 2


def test_pixels_reach_the_floors_of_the_data_pack(real_data: Path) -> None:
    """Its README: cosine 10-NN of 16 x 16 pixels is 0.359 on eval32, with equal votes: here a high temperature."""
    sets = {split: f"{real_data}/eval/eval32-{split}-*.tar" for split in ("train", "val")}
    result = of_pixels([10], 1000.0, px=32, resize_px=32, **sets)
    assert result.value == pytest.approx(0.359, abs=0.002)  # ties
    assert result.standard_error == pytest.approx((0.359 * 0.641 / 1000) ** 0.5, abs=1e-4)


def test_pixels_reach_the_floor_of_eval20_when_squashed(real_data: Path) -> None:
    """0.297 there is of whole images squashed to a square, which the crop of the protocol is not."""
    rows = {}
    for split in ("train", "val"):
        found = list(samples(f"{real_data}/eval/eval20-{split}-*.tar"))
        rows[split] = torch.cat([squashed(s.content) for s in found]), [str(s.label) for s in found]
    accuracy = knn_accuracy(*rows["train"], *rows["val"], [10], 1000.0)[10]
    assert accuracy == pytest.approx(0.297, abs=0.004)  # the resampling of the README's figure is not stated


def squashed(content: bytes) -> Tensor:
    small = Image.open(io.BytesIO(content)).convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return pixel_features(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None])


def test_features_are_those_of_the_images(real_data: Path) -> None:
    PIXELS.forget()
    labels = f"{real_data}/train/train32_labels.csv"
    found = PIXELS.share(f"{real_data}/train/train32-0000.tar", labels, 32, 32, 200)
    assert found.cls.shape == (200, 1, 768)
    assert len(set(found.labels)) == 10
    encoded_images = [s.content for s in samples(f"{real_data}/train/train32-0000.tar", max_images=200)]
    exact = pixel_features(torch.from_numpy(eval_crop(encoded_images[17], 32, 32).copy()).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(found.last[17], exact[0])


def test_images_in_folders_of_their_class_need_no_other_label(tmp_path: Path) -> None:
    for name in ("cats and dogs/a.png", "birds/b.png", "birds/more/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(tmp_path / name)
    assert {sample.key: sample.label for sample in samples(str(tmp_path))} == {
        "birds/b": "birds",
        "birds/more/c": "birds",
        "cats and dogs/a": "cats and dogs",
    }
