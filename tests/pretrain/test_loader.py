"""The loader end to end: the same bytes whatever the workers and ranks, resume, damage, a sentence for a mistake."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.loader import load_config
from pretrain.data.collate import Batch, prepare
from pretrain.data.crops import CropsConfig, CropSizes
from pretrain.data.decode import ImageLimits
from pretrain.data.loader import MAX_REDRAWS, DataConfig, DatasetConfig, Loader, LoaderConfig, build_loader
from pretrain.data.masks import MaskConfig
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.image_zoo import sixteen_bits

CROPS = CropsConfig(global_px=32, local_px=16, num_local_crops=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of two shards with 20 images each."""
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(("web", "seed")):
        for i in range(2):
            first = 100 * number + 20 * i
            picture_tar(folder / name / f"{i}.tar", range(first, first + 20), prefix=name)
    return folder


def data_config(shards: Path, **changes) -> DataConfig:
    datasets = {name: DatasetConfig(shards=str(shards / name), weight=w) for name, w in (("web", 3.0), ("seed", 1.0))}
    return DataConfig(**{"datasets": datasets} | changes)


def loader(
    config: DataConfig,
    num_workers: int = 0,
    crops: CropsConfig = CROPS,
    masks: MaskConfig = MaskConfig(),  # noqa: B008
    **changes,
) -> Loader:
    arguments = {
        "patch_size": 4,
        "seed": 0,
        "phase": 0,
        "start_step": 0,
        "num_steps": 5,
        "global_batch_size": 8,
        "rank": 0,
        "world_size": 1,
    } | changes
    execution = LoaderConfig(num_workers=num_workers, prefetch=2, timeout_s=60)
    return build_loader(config, crops, masks, execution=execution, **arguments)


def tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif hasattr(value, "tensors"):
            yield from ((f"{field.name}.{i}", tensor) for i, tensor in enumerate(value.tensors()))


def assert_equal(a: Batch, b: Batch) -> None:
    assert (a.step, a.sizes, a.skipped) == (b.step, b.sizes, b.skipped)
    for (name, first), (other, second) in zip(tensors(a), tensors(b), strict=True):
        assert name == other
        assert first.dtype == second.dtype
        assert torch.equal(first, second), name


def test_a_batch_has_the_shapes_that_it_says(shards: Path) -> None:
    crops = CropsConfig(global_px=32, local_px=16, gram_px=64, num_local_crops=3)
    (batch,) = loader(data_config(shards), crops=crops, num_steps=1)
    assert len(batch) == 8
    assert batch.global_crops.shape == (2, 8, 3, 32, 32)
    assert batch.local_crops.shape == (3, 8, 3, 16, 16)
    assert batch.gram_crops is not None
    assert batch.gram_crops.shape == (2, 8, 3, 64, 64)
    assert batch.masks is not None
    assert batch.masks.shape == (2, 8, 64)
    assert batch.masks.any(dim=-1).sum() == 8
    assert batch.global_photometric.factors.shape == (2, 8, 4)
    assert batch.local_photometric.sigma.shape == (3, 8)
    assert batch.positions.tolist() == list(range(8))
    assert sorted(batch.datasets.tolist()) == [0] * 6 + [1] * 2
    global_crops, local_crops, gram_crops = prepare(batch, "cpu", torch.bfloat16)
    assert global_crops.shape == (16, 3, 32, 32)
    assert local_crops.shape == (24, 3, 16, 16)
    assert gram_crops is not None
    assert gram_crops.shape == (16, 3, 64, 64)
    assert global_crops.dtype == local_crops.dtype == gram_crops.dtype == torch.bfloat16
    assert all(torch.isfinite(x).all() for x in (global_crops, local_crops, gram_crops))


def test_no_masks_and_no_local_crops(shards: Path) -> None:
    crops = CropsConfig(global_px=32, local_px=16, num_local_crops=0)
    (batch,) = loader(data_config(shards), crops=crops, num_steps=1, masks=MaskConfig(probability=0.0))
    assert batch.masks is None
    assert batch.local_crops.shape == (0, 8, 3, 16, 16)
    global_crops, local_crops, gram_crops = prepare(batch, "cpu")
    assert len(global_crops) == 16
    assert local_crops.shape == (0, 3, 16, 16)
    assert gram_crops is None


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bytes(shards: Path, num_workers: int) -> None:
    config = data_config(shards, homogeneous="seed", homogeneous_share=0.3)
    for alone, together in zip(loader(config), loader(config, num_workers), strict=True):
        assert_equal(alone, together)


def test_ranks_together_have_the_batch_of_one(shards: Path) -> None:
    config = data_config(shards)
    for whole, *parts in zip(
        loader(config), *(loader(config, rank=rank, world_size=2) for rank in range(2)), strict=True
    ):
        for (name, tensor), *pieces in zip(tensors(whole), *map(tensors, parts), strict=True):
            dim = 0 if name in ("positions", "datasets") else 1
            assert torch.equal(tensor, torch.cat([piece for _, piece in pieces], dim)), name


def test_resuming_is_starting_at_a_step(shards: Path) -> None:
    """In the middle of an epoch, on another number of workers and ranks."""
    config = data_config(shards)
    whole = list(loader(config, num_steps=12))
    for batch, expected in zip(loader(config, num_workers=2, start_step=7, num_steps=5), whole[7:], strict=True):
        assert_equal(batch, expected)
    (second,) = loader(config, start_step=9, num_steps=1, rank=1, world_size=2)
    assert torch.equal(second.global_crops, whole[9].global_crops[:, 4:])


def test_each_epoch_sees_each_image_once(shards: Path) -> None:
    config = DataConfig(datasets={"web": DatasetConfig(shards=str(shards / "web"))})
    made = loader(config)
    rows = np.concatenate([made.steps.order.batch(step)[1] for step in range(5)])
    assert sorted(rows.tolist()) == list(range(40))


def test_seeds_and_phases_differ_in_everything(shards: Path) -> None:
    first, *others = (next(iter(loader(data_config(shards), seed=s, phase=p))) for s, p in ((0, 0), (1, 0), (0, 1)))
    for other in others:
        for name in ("global_crops", "local_crops", "masks"):
            assert not torch.equal(getattr(first, name), getattr(other, name))


def test_global_random_state_is_left_alone(shards: Path) -> None:
    state, other = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(loader(data_config(shards), num_workers=1, num_steps=2))
    list(loader(data_config(shards), num_steps=2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert (other == np.random.get_state()[1]).all()  # noqa: NPY002


def test_sizes_change_by_step_for_all_ranks(shards: Path) -> None:
    sizes = [
        CropSizes(global_px=32, local_px=16, probability=0.5),
        CropSizes(global_px=48, local_px=8, probability=0.5),
    ]
    crops = CropsConfig(sizes=sizes, num_local_crops=2)
    by_rank = [list(loader(data_config(shards), crops=crops, rank=r, world_size=2, num_steps=8)) for r in range(2)]
    seen = [batch.global_crops.shape[-1] for batch in by_rank[0]]
    assert set(seen) == {32, 48}
    assert seen == [batch.global_crops.shape[-1] for batch in by_rank[1]]
    for batch in by_rank[0]:
        assert batch.masks is not None
        assert batch.masks.shape[-1] == (batch.sizes.global_px // 4) ** 2


def test_micro_batches_are_slices(shards: Path) -> None:
    (batch,) = loader(data_config(shards), num_steps=1)
    parts = batch.micro_batches(4)
    assert [part.positions.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for (name, tensor), *pieces in zip(tensors(batch), *map(tensors, parts), strict=True):
        dim = 0 if name in ("positions", "datasets") else 1
        assert torch.equal(tensor, torch.cat([piece for _, piece in pieces], dim)), name
    whole, _, _ = prepare(batch, "cpu")
    together = torch.cat([prepare(part, "cpu")[0].view(2, 2, 3, 32, 32) for part in parts], dim=1)
    torch.testing.assert_close(together.flatten(0, 1), whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="8 images does not split into 3"):
        batch.micro_batches(3)


def damaged_shards(folder: Path) -> Path:
    """Of 24 images, six are unusable, each in its own way; and a shard of noise beside them."""
    members = [(f"good{i:02d}.jpg", encoded(picture(i), quality=90)) for i in range(18)]
    members += [
        ("cut.jpg", encoded(picture(1), quality=90)[:900]),
        ("page.jpg", b"<html></html>"),
        ("large.png", encoded(picture(2, (400, 400)), "PNG")),
        ("noise.webp", np.random.default_rng(0).bytes(2000)),
        ("half.png", encoded(picture(3), "PNG")[:4000]),
        ("start.jpg", b"\xff\xd8\xff"),
    ]
    write_tar(folder / "a.tar", members)
    (folder / "noise.tar").write_bytes(np.random.default_rng(1).bytes(5000))
    return folder


@pytest.mark.parametrize(("format_", "colours"), [("PNG", 1), ("PNG", 3), ("TIFF", 1)])
def test_dark_16_bit_images_are_named_and_stay(tmp_path: Path, format_: str, colours: int) -> None:
    dark = sixteen_bits(4095, format_, colours)
    said = sixteen_bits(4095, format_, colours, declared=12)
    members = [(f"good{i}.jpg", encoded(picture(i), quality=90)) for i in range(6)]
    members += [(f"dark.{format_.lower()}", dark), (f"said.{format_.lower()}", said)]
    write_tar(tmp_path / "a.tar", members)
    (batch,) = loader(DataConfig(datasets={"pool": DatasetConfig(shards=str(tmp_path))}), num_steps=1)
    assert [(odd.image, odd.reason) for odd in batch.odd] == [(f"a.tar:dark.{format_.lower()}", "dark_16_bit")]
    assert batch.skipped == ()
    first, second = batch.micro_batches(2)
    assert (first.odd, second.odd) == (batch.odd, ())


def test_damaged_images_are_counted_and_replaced(tmp_path: Path) -> None:
    """Each epoch draws each damaged one: reported with its name and reason, replaced alike on workers and ranks."""
    config = DataConfig(
        datasets={"pool": DatasetConfig(shards=str(damaged_shards(tmp_path)))}, limits=ImageLimits(max_pixels=10_000)
    )
    made = loader(config, num_steps=3)
    assert made.tables["pool"].refused == {"damaged_shard": 1}
    batches = list(made)
    skipped = [skip for batch in batches for skip in batch.skipped]
    reasons = {skip.image: skip.reason for skip in skipped}
    assert reasons == {
        "a.tar:cut.jpg": "damaged",
        "a.tar:page.jpg": "not_an_image",
        "a.tar:large.png": "too_many_pixels",
        "a.tar:noise.webp": "not_an_image",
        "a.tar:half.png": "damaged",
        "a.tar:start.jpg": "not_an_image",
    }
    assert all(len(batch) == 8 and skip.dataset == "pool" for batch in batches for skip in batch.skipped)
    for alone, together in zip(batches, loader(config, num_workers=2, num_steps=3), strict=True):
        assert_equal(alone, together)
    halves = [list(loader(config, num_steps=3, rank=rank, world_size=2)) for rank in range(2)]
    for batch, first, second in zip(batches, *halves, strict=True):
        assert batch.skipped == first.skipped + second.skipped
        assert torch.equal(batch.global_crops, torch.cat([first.global_crops, second.global_crops], dim=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_where_everything_is_damaged_it_stops(tmp_path: Path, num_workers: int) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"\xff\xd8\xff nothing") for i in range(9)])
    config = DataConfig(datasets={"bad": DatasetConfig(shards=str(tmp_path))})
    with pytest.raises(ValueError, match=rf"data\.datasets\.bad: {1 + MAX_REDRAWS} images .* are all damaged"):
        list(loader(config, num_workers))


def test_a_shard_that_goes_away_during_the_run_is_reported(tmp_path: Path) -> None:
    for i in range(3):
        picture_tar(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 10), prefix=str(i))
    made = loader(DataConfig(datasets={"web": DatasetConfig(shards=str(tmp_path))}), num_steps=3)
    (tmp_path / "1.tar").unlink()
    skipped = [skip for batch in made for skip in batch.skipped]
    assert len(skipped) >= 4
    assert {skip.reason for skip in skipped} == {"unreadable"}
    assert all(skip.image.startswith("1.tar:") for skip in skipped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"patch_size": 5},
            r"crops\.global_px=32 is not a multiple of the patch size 5; the nearest that are: 30 and 35",
        ),
        ({"global_batch_size": 9, "world_size": 2}, r"does not split over 2 ranks; the nearest that do are 8 and 10"),
        ({"global_batch_size": 100}, r"data\.datasets\.web has 40 images, fewer than global_batch_size=100"),
    ],
)
def test_mistakes_are_told_before_any_time_is_lost(shards: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(data_config(shards), **arguments)


def test_missing_shards_and_empty_datasets_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.datasets is empty"):
        loader(DataConfig())
    with pytest.raises(ValueError, match=r"data\.datasets\.web\.shards: nothing found at"):
        loader(DataConfig(datasets={"web": DatasetConfig(shards=str(tmp_path / "nothing"))}))
    write_tar(tmp_path / "text.tar", [("a.txt", b"words"), ("a.json", b"{}")])
    with pytest.raises(ValueError, match=r"data\.datasets\.web\.shards: .* without a usable image"):
        loader(DataConfig(datasets={"web": DatasetConfig(shards=str(tmp_path))}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"homogeneous": "imagenet", "homogeneous_share": 0.1}, "none of data.datasets: web, seed"),
        ({"homogeneous": "seed"}, "give both or neither"),
        ({"homogeneous_share": 0.1}, "give both or neither"),
        ({"homogeneous_share": 1.5}, r"must be in \[0, 1\]"),
        ({"shuffle_shards": -1}, "shuffle_shards"),
        ({"datasets": {"web": DatasetConfig(shards="x", weight=0.0)}}, "weights are all 0"),
        (
            {"datasets": {"web": DatasetConfig(shards="x"), "old": DatasetConfig(shards="y", weight=0.0)}},
            r"data\.datasets\.old\.weight=0 never draws from it",
        ),
    ],
)
def test_wrong_settings_are_named(shards: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_config(shards, **changes)


def test_configs_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("datasets: {web: {shards: out, weight: 2.0}, seed: {shards: s.tar}}\nhomogeneous: seed\n")
    config = load_config(DataConfig, "curation", str(path), ["homogeneous_share=0.1", "limits.max_pixels=5"])
    assert config.datasets["web"] == DatasetConfig(shards="out", weight=2.0)
    assert config.limits.max_pixels == 5
    path.write_text("sizes: [{global_px: 512, local_px: 112, gram_px: 768, probability: 0.3}]\n")
    crops = load_config(CropsConfig, "curation", str(path), ["blur=as_intended"])
    assert crops.all_sizes() == [CropSizes(global_px=512, local_px=112, gram_px=768, probability=0.3)]
    path.write_text("ratio: [0.2, 0.4]\n")
    assert load_config(MaskConfig, "curation", str(path)).ratio == [0.2, 0.4]


def test_real_images(real_data: Path) -> None:
    """CIFAR-sized shards and the hostile pool, mixed; batches come whole."""
    config = DataConfig(
        datasets={
            "train": DatasetConfig(shards=str(real_data / "train")),
            "bad": DatasetConfig(shards=str(real_data / "pool_bad")),
        }
    )
    batches = list(loader(config, num_workers=2, global_batch_size=32, num_steps=6))
    assert all(batch.global_crops.shape == (2, 32, 3, 32, 32) for batch in batches)
    reasons = {skip.reason for batch in batches for skip in batch.skipped}
    assert {"damaged", "not_an_image", "too_many_pixels"} <= reasons
    assert {skip.dataset for batch in batches for skip in batch.skipped} == {"bad"}
