"""Evaluations of one vector an image, against scikit-learn, torch's own optimiser and loops."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.downstream.evals.baselines import Colours, Pixels, as_they_are
from pretrain.downstream.evals.errors import bootstrap, of_mean
from pretrain.downstream.evals.frozen import Frozen, Pooled, numbered
from pretrain.downstream.evals.labelled import LeftOut
from pretrain.downstream.evals.pooled import copies, knn, linear, logistic, retrieval
from pretrain.downstream.evals.pooled.knn import knn_accuracy
from pretrain.downstream.evals.sets import CopySet, LabelledSet, RetrievalSet
from tests.conftest import encoded, picture, write_tar

CPU = torch.device("cpu")


def pixels() -> Frozen:
    return Frozen(tokens=Pixels(), image=as_they_are(32), device=CPU)


def rows(
    count: int, seed: int, spread: float = 0.4, width: int = 12, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Rows around a direction for each class, and their classes."""
    directions = np.random.default_rng(7).normal(size=(4, 12))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count)
    return (directions[labels] + spread * generator.normal(size=(count, 12))).astype(np.float32), labels


def test_neighbours_vote_as_in_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    (train, labels), (val, truth) = rows(300, 1), rows(200, 2)
    unit = [F.normalize(torch.from_numpy(one), dim=1).double().numpy() for one in (train, val)]

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    for k in (1, 20, 200):
        theirs = KNeighborsClassifier(k, weights=weights, metric="cosine").fit(unit[0], labels)
        ours = knn_accuracy(
            torch.from_numpy(train),
            labels.astype(str).tolist(),
            torch.from_numpy(val),
            truth.astype(str).tolist(),
            [k],
            0.07,
        )
        assert ours[k] == pytest.approx(theirs.score(unit[1], truth), abs=1e-12)


def test_a_large_bank_is_searched_by_faiss_with_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = F.normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(3000) % 7
    found = knn.nearest(bank[:50], bank, labels, 20)
    monkeypatch.setattr(knn, "_LARGE", 3000)
    by_faiss = knn.nearest(bank[:50], bank, labels, 20)
    torch.testing.assert_close(by_faiss[0], found[0])
    assert torch.equal(by_faiss[1], found[1])


def test_probes_are_those_of_torch_for_each_rate() -> None:
    features, labels = (torch.from_numpy(one) for one in rows(60, 3))
    rates, generator = [0.01, 0.5], torch.Generator().manual_seed(0)
    orders = linear.batch_orders(60, 16, 20, generator)
    ours = linear.train_probes(features, labels, 4, rates, orders, seed=5)
    for number, rate in enumerate(rates):
        weight = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(5)).mul_(0.01)[number].requires_grad_()
        bias = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=rate, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(orders))
        for chosen in orders:
            optimizer.zero_grad()
            F.cross_entropy(features[chosen] @ weight.T + bias, labels[chosen]).backward()
            optimizer.step()
            cosine.step()
        torch.testing.assert_close(ours.weight[number], weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.bias[number], bias.detach(), rtol=1e-4, atol=1e-5)
    assert ours.answers(features).shape == (2, 60)


def test_every_image_comes_once_before_any_comes_again() -> None:
    orders = linear.batch_orders(10, 4, 5, torch.Generator().manual_seed(1))
    assert [len(one) for one in orders] == [4] * 5
    assert sorted(torch.cat(orders)[:10].tolist()) == list(range(10))
    assert [len(one) for one in linear.batch_orders(3, 8, 2, torch.Generator())] == [3, 3]


def test_layers_and_the_mean_are_probed_separately() -> None:
    cls, mean = torch.arange(24.0).view(2, 3, 4), torch.zeros(2, 5)
    pooled = Pooled(["a", "b"], ["x", "y"], cls, mean, LeftOut())
    kinds = {name: of(pooled) for name, of in linear.kinds_of(pooled).items()}
    assert {name: one.shape[1] for name, one in kinds.items()} == {
        "CLS": 4,
        "CLS + mean": 9,
        "CLS of 3 layers": 12,
        "CLS of 3 layers + mean": 17,
    }
    assert torch.equal(kinds["CLS"], cls[:, 2])
    one_layer = linear.kinds_of(Pooled(["a", "b"], ["x", "y"], cls[:, :1], mean, LeftOut()))
    assert list(one_layer) == ["CLS", "CLS + mean"]


def labelled_set(folder: Path, count: int, noise: float = 0.3) -> LabelledSet:
    """Pictures of two classes: brighter above, or below."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        members = []
        for n in range(count):
            image = generator.normal(0.5, noise, (32, 32, 3))
            image[:16] += 0.25 if n % 2 else -0.25
            content = encoded_array(image)
            members += [(f"{split}{n:03d}.json", b'{"label": "%d"}' % (n % 2)), (f"{split}{n:03d}.png", content)]
        write_tar(folder / f"{split}.tar", members)
    return LabelledSet(train=f"{folder}/train.tar", val=f"{folder}/val.tar")


def encoded_array(image: np.ndarray) -> bytes:
    from PIL import Image

    return encoded(Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)), "PNG")


def test_what_learns_learns_what_can_be_seen(tmp_path: Path) -> None:
    data = labelled_set(tmp_path, 60)
    frozen = pixels()
    probe = linear.run(frozen, data, linear.LinearConfig(least_steps=200))
    assert probe.value > 0.95
    assert probe.figures["best_on_val"] >= probe.value
    assert probe.chosen["steps"] == 200
    assert probe.images == {"train": 60, "val": 60}
    assert logistic.run(frozen, data, logistic.LogisticConfig()).value > 0.95
    noisy = labelled_set(tmp_path / "noisy", 60, noise=2.5)
    few = logistic.run_few(pixels(), noisy, logistic.FewShotConfig(shots=[25, 1], draws=10))
    assert few.figures["1 of each class"] + 0.1 < few.value
    assert few.standard_error > 0
    with pytest.raises(ValueError, match="asks for 31 images of each class, and one class has 30"):
        logistic.run_few(frozen, data, logistic.FewShotConfig(shots=[31]))


def test_the_penalty_is_chosen_without_the_judged_images(tmp_path: Path) -> None:
    """With every label of val wrong the choice is the same: it never saw them."""
    data = labelled_set(tmp_path, 60)
    honest = logistic.run(pixels(), data, logistic.LogisticConfig())
    keys = [f"val{n:03d}" for n in range(60)]
    (tmp_path / "wrong.csv").write_text("key,label\n" + "".join(f"{k},{1 - n % 2}\n" for n, k in enumerate(keys)))
    lied = LabelledSet(train=data.train, val=data.val, val_labels=f"{tmp_path}/wrong.csv")
    found = logistic.run(pixels(), lied, logistic.LogisticConfig())
    assert (found.chosen, found.value) == (honest.chosen, pytest.approx(1 - honest.value))


def test_shots_are_drawn_of_every_class() -> None:
    labels = np.array([0] * 5 + [1] * 7 + [2] * 9)
    drawn = logistic.drawn(labels, 3, np.random.default_rng(0))
    assert np.bincount(labels[drawn]).tolist() == [3, 3, 3]
    assert len(set(drawn.tolist())) == 9


def test_unknown_labels_are_wrong_answers() -> None:
    assert numbered(["b", "owl", "a"], ["a", "b"]).tolist() == [1, -1, 0]


def test_average_precision_is_the_area_that_scikit_learn_gives() -> None:
    from sklearn.metrics import auc, precision_recall_curve

    generator = np.random.default_rng(3)
    for count in (1, 3, 10):
        truth = np.zeros(40, bool)
        truth[generator.choice(40, count, replace=False)] = True
        scores = generator.normal(size=40) + truth
        places = retrieval.places_of(np.argsort(-scores), truth, np.zeros(40, bool))
        precision, recall, _ = precision_recall_curve(truth, scores)
        assert retrieval.average_precision(places) == pytest.approx(auc(recall, precision))


def test_settings_of_the_revisited_protocol_by_hand() -> None:
    """Ranking: junk, hard, negative, easy. Easy: junk and hard are out; medium: junk is; hard: junk and easy are."""
    relations = {name: np.zeros(4, bool) for name in retrieval.RELATIONS}
    for place, name in enumerate(("junk", "hard", "", "easy")):
        if name:
            relations[name][place] = True
    found = retrieval.judge([np.arange(4)], [relations], [1, 5])
    assert found["easy"][0] == pytest.approx([(0 + 1 / 2) / 2])
    assert found["hard"][0] == pytest.approx([1])
    assert found["medium"][0] == pytest.approx([(1 + (1 / 2 + 2 / 3) / 2) / 2])
    assert found["medium"][1] == {1: 1.0, 5: pytest.approx(2 / 3)}  # no further than the last wanted one
    nothing = {name: np.zeros(4, bool) for name in retrieval.RELATIONS}
    assert retrieval.judge([np.arange(4)], [nothing], [1]) == {}


def table(path: Path, columns: list[str], lines: list[list[str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])
    return str(path)


def copied(folder: Path) -> tuple[Path, Path]:
    """Ten pictures, and of the first five a darker copy."""
    originals = [picture(n, (48, 48)) for n in range(10)]
    write_tar(folder / "refs.tar", [(f"r{n}.png", encoded(image, "PNG")) for n, image in enumerate(originals)])
    queries = [image.point(lambda value: value * 3 // 4) for image in originals[:5]]
    queries += [picture(n, (48, 48)) for n in range(20, 23)]
    write_tar(folder / "queries.tar", [(f"q{n}.png", encoded(image, "PNG")) for n, image in enumerate(queries)])
    return folder / "queries.tar", folder / "refs.tar"


def test_retrieval_of_darker_copies(tmp_path: Path) -> None:
    queries, database = copied(tmp_path)
    lines = [[f"q{n}", f"r{n}", "easy" if n < 3 else "hard"] for n in range(5)]
    truth = table(tmp_path / "truth.csv", ["query", "image", "relation"], lines)
    data = RetrievalSet(queries=str(queries), database=str(database), truth=truth)
    found = retrieval.run(pixels(), data, retrieval.RetrievalConfig())
    assert (found.value, found.standard_error) == (1.0, 0.0)
    assert found.figures["mAP easy"] == found.figures["mAP hard"] == 1.0
    assert found.images == {"queries": 8, "database": 10}
    for line, told in (
        (["q0", "r99", "easy"], "r99 is in no part of the database"),
        (["q99", "r0", "easy"], "q99 is in no part of the queries"),
        (["q0", "r0", "good"], "its relation 'good' is none of easy, hard, junk"),
        (["q0", "r0", "junk"], "names no easy or hard image"),
    ):
        table(tmp_path / "truth.csv", ["query", "image", "relation"], [line])
        with pytest.raises(ValueError, match=told):
            retrieval.run(pixels(), data, retrieval.RetrievalConfig())
    table(tmp_path / "truth.csv", ["query", "image"], [])
    with pytest.raises(ValueError, match="needs the columns query, image and relation, found query, image"):
        retrieval.run(pixels(), data, retrieval.RetrievalConfig())


def test_micro_ap_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(5)
    truth = generator.random(500) < 0.1
    scores = generator.normal(size=500) + 1.5 * truth
    ours = copies.micro_average_precision(scores, truth, int(truth.sum()))
    assert ours == pytest.approx(average_precision_score(truth, scores))
    assert copies.micro_average_precision(scores, truth, 2 * int(truth.sum())) == pytest.approx(ours / 2)


def test_recall_at_a_precision_by_hand() -> None:
    is_true = np.array([True, True, False, True, False, False])
    scores = -np.arange(6.0)
    assert copies.recall_at_precision(scores, is_true, 4, 0.75) == 3 / 4
    assert copies.recall_at_precision(scores, is_true, 4, 0.9) == 2 / 4
    assert copies.recall_at_precision(scores, ~is_true, 3, 0.9) == 0


def test_copies_are_found_and_scores_normalised(tmp_path: Path) -> None:
    queries, references = copied(tmp_path)
    lines = [[f"q{n}", f"r{n}" if n < 5 else ""] for n in range(8)]
    truth = table(tmp_path / "truth.csv", ["query", "reference"], lines)
    write_tar(tmp_path / "other.tar", [(f"b{n}.png", encoded(picture(n, (40, 40)), "PNG")) for n in range(30, 50)])
    data = CopySet(queries=str(queries), references=str(references), truth=truth, background=f"{tmp_path}/other.tar")
    found = copies.run(pixels(), data, copies.CopiesConfig())
    assert found.value == found.figures["micro-AP, normalised"] == 1.0
    assert found.figures["recall at precision 0.9"] == 1.0
    assert found.images == {"queries": 8, "references": 10, "background": 20}
    plain = copies.run(
        pixels(), CopySet(queries=str(queries), references=str(references), truth=truth), copies.CopiesConfig()
    )
    assert "micro-AP, normalised" not in plain.figures
    table(tmp_path / "truth.csv", ["query", "reference"], [["q0", "r77"]])
    with pytest.raises(ValueError, match="r77 is in no part of references"):
        copies.run(pixels(), data, copies.CopiesConfig())


def test_a_hub_query_is_put_down_by_the_background() -> None:
    """A query that is like everything has high scores without being a copy; normalised, true copies stand above."""
    config = copies.CopiesConfig(background_neighbours=2)
    generator = torch.Generator().manual_seed(0)
    hub = F.normalize(torch.ones(1, 16), dim=1)
    background = F.normalize(torch.ones(20, 16) + 0.3 * torch.randn(20, 16, generator=generator), dim=1)
    other = F.normalize(torch.randn(1, 16, generator=generator), dim=1)
    shift = copies._background(torch.cat([hub, other]), background, config)
    assert shift[0] > 0.9 > shift[1]
    torch.testing.assert_close(shift, (torch.cat([hub, other]) @ background.T).topk(2).values.mean(dim=1))


def test_a_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=400)
    assert bootstrap(400, lambda drawn: float(values[drawn].mean()), draws=2000) == pytest.approx(
        of_mean(values), rel=0.06
    )


def test_colours_are_the_cosine_of_histograms() -> None:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    (found,) = Colours()([images])
    assert found.grid == (2, 3)
    assert found.patches.shape == (2, 6, 24)
    expected = np.histogramdd(images[0].flatten(1).T.numpy(), bins=(6, 6, 6), range=[(0, 1)] * 3)[0]
    np.testing.assert_allclose(found.cls[0].square().numpy() * 32 * 48, expected.ravel(), atol=1e-3)
    patch = images[1, :, 16:32, 16:32]
    counts = np.stack([np.histogram(channel.numpy(), bins=8, range=(0, 1))[0] for channel in patch]).ravel()
    np.testing.assert_allclose(found.patches[1, 4].square().numpy() * 256, counts, atol=1e-3)


def test_patches_of_pixels_lie_where_the_picture_has_them() -> None:
    image = torch.zeros(1, 3, 32, 48)
    image[:, 1, 16:, 32:] = 1
    (found,) = Pixels()([image])
    assert found.patches.shape == (1, 6, 48)
    assert int(found.patches[0].sum(dim=1).argmax()) == 5
    assert (found.patches[0].sum(dim=1) > 1).nonzero().flatten().tolist() == [5]  # antialiasing leaks a little
    assert found.patches[0, 5].reshape(3, 16).sum(dim=1).tolist() == pytest.approx([0, 16, 0], abs=1)
