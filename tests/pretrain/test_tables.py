"""Tables say what records say, and claims no more than they show."""

import json
from pathlib import Path

import pytest
import yaml
from scipy.stats import ttest_rel

from benchmarks.study.record import write_record
from benchmarks.study.summary import paired_p
from benchmarks.tables import main
from tests.pretrain.tiny_experiment import EXPERIMENT

MACHINE = {"cpu": "a processor", "threads": 1, "torch": "2.0.0+cpu"}
KNN = {"recipe": [0.50, 0.52, 0.51], "no_local": [0.40, 0.43, 0.41], "untrained": [0.50, 0.53, 0.49], "pixels": [0.3]}


def write_records(root: Path, figures: dict[str, list[float]], **changes: object) -> None:
    experiments = root / "benchmarks" / "experiments"
    experiments.mkdir(parents=True, exist_ok=True)
    (experiments / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT | changes, sort_keys=False))
    for variant, values in figures.items():
        kind = EXPERIMENT["variants"][variant].get("kind", "trained")
        for seed, value in enumerate(values):
            facts = {"variant": variant, "seed": seed, "images_seen": 48_000 if kind == "trained" else 0}
            facts |= {"minutes": {"processor": 30.0 + seed}, "machine": MACHINE}
            results = {name: {"metric": "accuracy", "value": value} for name in ("knn", "linear")}
            points = [{"images": n, "evaluation": "knn", "value": value * n / 48_000} for n in (24_000, 48_000)]
            config = yaml.safe_dump({"seed": seed, "optim": {"base_lr": 0.1}})
            folder = root / "benchmarks" / "records" / "tiny" / f"{variant}-seed{seed}"
            write_record(folder, facts, results, config, [], points if kind == "trained" else [])


def written(root: Path, mark: str, file: str = "README.md", before: str = "") -> str:
    """What stands in a file's block after the command."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(f"{before}<!-- records: tiny{mark} -->\n{before}<!-- /records -->\n")
    assert main([], root) == 0
    return "\n".join((root / file).read_text().splitlines()[1:-1])


def cells(block: str, variant: str) -> list[str]:
    return next(
        row for line in block.splitlines() if (row := [c.strip() for c in line.split("|")[1:-1]])[:1] == [variant]
    )


def test_a_row_a_variant(tmp_path: Path) -> None:
    write_records(tmp_path, KNN)
    block = written(tmp_path, "")
    p = ttest_rel(KNN["no_local"], KNN["recipe"]).pvalue
    assert cells(block, "no_local") == [
        "no_local", "41.3 ± 1.5", "41.3 ± 1.5", f"-9.7 (p = {p:.2g})", "3", "48,000", "31",
    ]  # fmt: skip
    assert cells(block, "recipe")[1:4] == ["51.0 ± 1.0", "51.0 ± 1.0", ""]
    # Pixels have one run, which stands for every seed.
    assert cells(block, "pixels") == ["pixels", "30.0", "30.0", "-21.0 (p < 0.001)", "1", "0", ""]
    assert "1 thread" in block
    assert cells(written(tmp_path, " evaluations=knn,own"), "variant")[2] == "own, %"
    chosen = written(tmp_path, " variants=pixels,recipe evaluations=linear")
    assert [line.split("|")[1].strip() for line in chosen.splitlines() if line.startswith("|")] == [
        "variant", "---", "pixels", "recipe",
    ]  # fmt: skip


def test_p_is_that_of_scipy() -> None:
    one, other = KNN["recipe"], KNN["untrained"]
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert paired_p(differences) == pytest.approx(ttest_rel(one, other).pvalue, rel=1e-9)
    assert paired_p(differences[:2]) is None
    assert paired_p([0.0, 0.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("worse", "seeds", "said"),
    [
        ("no_local", 3, "Recipe is better than no_local in knn: 51.0 ± 1.0% against 41.3 ± 1.5%, +9.7 (3 seeds, p = "),
        ("pixels", 3, "Recipe is better than pixels in knn: 51.0 ± 1.0% against 30.0%, +21.0 (3 seeds, p < 0.001)."),
        ("no_local", 2, "Not shown: recipe is better than no_local in knn: 51.0 ± 1.4% against 41.5 ± 2.1%, +9.5 (2"),
        ("untrained", 3, "Not shown: recipe is better than untrained in knn: 51.0 ± 1.0% against 50.7 ± 2.1%, +0.3 (3"),
    ],
)
def test_better_is_said_of_three_seeds_and_a_small_p_only(tmp_path: Path, worse: str, seeds: int, said: str) -> None:
    claims = [{"better": "recipe", "worse": worse, "evaluation": "knn"}]
    write_records(tmp_path, {name: values[:seeds] for name, values in KNN.items()}, claims=claims)
    block = " ".join(written(tmp_path, " claims").split())
    assert block.startswith(f"- {said}")


def test_what_is_worse_is_said_to_be(tmp_path: Path) -> None:
    claims = [{"better": "no_local", "worse": "recipe", "evaluation": "knn"}]
    write_records(tmp_path, KNN, claims=claims)
    assert written(tmp_path, " claims").startswith("- Refuted, for it is worse: no_local is better than recipe")


def test_an_edited_table_is_caught_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path, KNN)
    written(tmp_path, "", "docs/a.md")
    good = (tmp_path / "docs" / "a.md").read_text()
    assert main(["--check"], tmp_path) == 0
    (tmp_path / "docs" / "a.md").write_text(good.replace("51.0", "61.0"))
    assert main(["--check"], tmp_path) == 1
    assert "docs/a.md" in capsys.readouterr().err
    assert "61.0" in (tmp_path / "docs" / "a.md").read_text()
    assert main([], tmp_path) == 0
    assert (tmp_path / "docs" / "a.md").read_text() == good
    # A new record changes the table, too.
    write_records(tmp_path, {"lightly_dino": [0.4]})
    assert main(["--check"], tmp_path) == 1


def test_curve_and_sentence(tmp_path: Path) -> None:
    published = {"DINO": {"source": "a plot", "points": {48_000: 0.469, 96_000: 0.5}}}
    write_records(tmp_path, KNN, published=published)
    block = written(tmp_path, " curve variants=recipe,no_local")
    assert cells(block, "images seen") == ["images seen", "recipe", "no_local", "DINO"]
    assert cells(block, "24,000") == ["24,000", "25.5 ± 0.5", "20.7 ± 0.8", ""]
    assert cells(block, "48,000") == ["48,000", "51.0 ± 1.0", "41.3 ± 1.5", "46.9"]
    assert cells(block, "96,000") == ["96,000", "", "", "50.0"]
    line = written(tmp_path, " sentence variants=recipe", "configs/pretrain/a.yaml", before="# ")
    assert line == "# recipe: knn 51.0 ± 1.0%, linear 51.0 ± 1.0% (3 seeds)"


def test_what_was_learned_from(tmp_path: Path) -> None:
    write_records(tmp_path, KNN)
    assert "No record yet" in written(tmp_path, " images")
    sets = [{"images": "raw", "of": 44_000, "natural": 0.4671}, {"images": "chosen", "of": 900, "natural": 0.0}]
    (tmp_path / "benchmarks" / "records" / "tiny" / "images.json").write_text(json.dumps(sets))
    block = written(tmp_path, " images")
    assert cells(block, "images") == ["images", "of", "natural, %"]
    assert cells(block, "raw") == ["raw", "44,000", "46.7"]
    assert cells(block, "chosen") == ["chosen", "900", "0.0"]


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (" variants=recip", "variants=recip is none of recipe"),
        (" tabel", "'tabel' is none of table"),
        (" rows=a", "'rows' is none of table"),
        ("y", "no experiment named 'tinyy'"),
    ],
)
def test_a_wrong_mark_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str, said: str) -> None:
    write_records(tmp_path, {})
    (tmp_path / "README.md").write_text(f"<!-- records: tiny{mark} -->\n<!-- /records -->\n")
    assert main(["--check"], tmp_path) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "README.md").write_text("<!-- records: tiny -->\n")
    assert main([], tmp_path) == 2
    assert "README.md: line 1: the block has no" in capsys.readouterr().err


def test_seeds_of_other_settings_are_no_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path, KNN)
    written(tmp_path, "")
    path = tmp_path / "benchmarks" / "records" / "tiny" / "recipe-seed1" / "config.yaml"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert main(["--check"], tmp_path) == 2
    assert "optim.base_lr" in capsys.readouterr().err


def test_the_tables_of_this_repository_are_what_its_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err
