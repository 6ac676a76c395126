import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.account.report import charts, sections
from curation.account.report.map import neighbour_map, principal_axes
from curation.account.report.page import changed_settings
from curation.account.report.pictures import Ref, read_pictures, thumbnail
from curation.account.report.step import balance_figures
from curation.account.report.wording import visible
from curation.config import CurationConfig
from curation.ops.kmeans import balance
from curation.pipeline import run_pipeline
from curation.reading.pictures.images import ImageLimits
from curation.reading.seeds import RetrievalRule, SeedSet
from curation.stages.balance import BalanceConfig
from curation.state import Run
from tests.tiny_run import HOSTILE, REASON, curate, full_run, jpeg, picture, write_tar

SECTIONS = ["funnel", "retrieved", "map", "duplicates", "threshold", "leaks", "rejected", "balance", "recall", "time"]
SECTIONS += ["settings"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return full_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def page(run) -> str:
    return run.folder.read_bytes("report.html").decode()


class Reader(html.parser.HTMLParser):
    """Tags that are open, in order; and everything that a browser would take for an element or an attribute."""

    VOID = frozenset(["meta", "img", "br", "path", "circle", "rect", "image", "polyline", "hr"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text: str) -> Reader:
    read = Reader(text)
    assert not read.open
    assert [name for name in SECTIONS if name not in read.ids] == []
    assert not {"script", "iframe", "object", "embed", "form", "link"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    # Nothing is fetched: pictures are inline, links stay on the page.
    urls = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert urls
    assert all(url.startswith(("data:image/jpeg;base64,", "#")) for url in urls)
    assert "url(" not in text
    assert "nan" not in re.sub(r"base64,[^'\"]+", "", text).lower().split()
    return read


def test_the_page_has_every_section_and_nothing_in_it_acts(page):
    read = check_page(page)
    assert read.tags.count("img") > 50
    assert len(page) < 3_000_000


def test_hostile_names_appear_as_text_only(page):
    for raw in (*HOSTILE[:3], "<i>broken", "<i>nothing", "<e>", REASON, "near<b>"):
        assert raw not in page
    for raw in ("\u202e", "\x1b"):
        assert raw not in page
    assert "&lt;i&gt;nothing" in page
    assert "score &lt;img src=x&gt;" in page
    assert "near&lt;b&gt;" in page


def test_figures_agree_with_the_decisions(run, page):
    figures = json.loads(run.folder.read_bytes("report.json"))
    decisions = pq.read_table(run.folder.path("decisions.parquet"))
    status = decisions["status"].to_pylist()
    assert figures["funnel"]["status"] == {name: status.count(name) for name in figures["funnel"]["status"]}
    assert status.count("leak") == 4
    assert status.count("rejected") == 4
    assert status.count("duplicate") == 6
    assert f"<b>{status.count('kept'):,}</b> of {len(status):,} images kept" in page
    assert figures["dedup"]["largest groups"][0]["size"] == 2


def test_the_page_is_the_same_again(run, page):
    run.folder.write_bytes("report/manifest.json", b"{}")
    run_pipeline(run)
    assert run.folder.read_bytes("report.html").decode() == page


def test_a_source_that_has_gone_leaves_placeholders(run):
    wanted = [Ref("pool", gid) for gid in range(30)]
    good = read_pictures({"pool": run.pool}, wanted, ImageLimits())
    assert all(good[ref].jpeg for ref in wanted[:24])
    source = run.pool.index(0, ["source"])["source"][0].as_py()
    away = Path(source).rename(source + ".away")
    try:
        gone = read_pictures({"pool": run.pool}, wanted, ImageLimits())
    finally:
        away.rename(source)
    assert set(gone) == set(good)
    assert not any(p.jpeg for p in gone.values())
    assert gone[wanted[0]].problem == "source not readable any more"
    assert gone[wanted[0]].key == "p00"


@pytest.mark.parametrize(
    ("num_images", "config"),
    [(5, {"balance": BalanceConfig(num_images=3)}), (1, {"balance": BalanceConfig(fraction=1.0)})],
)
def test_small_plain_pools_have_a_page_too(tmp_path, num_images, config):
    """No seed set, no evaluation set, no duplicate, no leak, nothing rejected."""
    pool = write_tar(tmp_path / "pool.tar", {f"k{i}": {"jpg": jpeg(picture(i))} for i in range(num_images)})
    run = curate(tmp_path / "run", pool, **config)
    text = run.folder.read_bytes("report.html").decode()
    check_page(text)
    for sentence in (
        "No evaluation set was given",
        "Nothing was rejected",
        "No two images of this pool were found to be near-duplicates",
        "a balanced sample",
    ):
        assert sentence in text


def test_no_leak_and_seed_sets_that_draw_nothing(tmp_path):
    pool = write_tar(tmp_path / "pool.tar", {f"k{i}": {"jpg": jpeg(picture(i))} for i in range(8)})
    evaluation = write_tar(tmp_path / "e.tar", {f"e{i}": {"jpg": jpeg(picture(50 + i))} for i in range(2)})
    rule = {"urls": (write_tar(tmp_path / "s.tar", {"s0": {"jpg": jpeg(picture(70))}}),)}
    seeds = {
        "as-is": SeedSet(name="as-is", rule=RetrievalRule(mode="none"), include_as_is=True, **rule),
        "far": SeedSet(name="far", rule=RetrievalRule(min_similarity=0.99), **rule),
    }
    run = curate(tmp_path / "run", pool, seeds, {"held-out": evaluation})
    text = run.folder.read_bytes("report.html").decode()
    check_page(text)
    assert "this set draws nothing from the pool" in text
    assert "No image of the pool copies an image of held-out (0)" in text


# --- parts -----------------------------------------------------------------------------------------------------------


def test_percentages_never_round_to_nothing_or_everything():
    assert charts.percent(0, 10) == "0%"
    assert charts.percent(1, 1_000_000) == "< 0.1%"
    assert charts.percent(999_999, 1_000_000) == "99.9%"
    assert charts.percent(10, 10) == "100%"
    assert charts.percent(1, 3) == "33%"
    assert charts.percent(0, 0) == "0%"


def test_text_is_made_visible():
    assert visible("plain ünï 猫") == "plain ünï 猫"
    assert visible("a\x1b[2J\u202eb\ud800") == "a\\x1b[2J\\u202eb\\ud800"
    assert charts.clean("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"


def test_secrets_in_urls_are_not_shown():
    assert sections.public_url("s3://key:secret@bucket/a b/c.tar?X-Amz-Signature=1#x") == "s3://bucket/a b/c.tar"
    assert sections.public_url("/data/pool-*.tar") == "/data/pool-*.tar"


def test_thumbnails_fit_and_are_never_enlarged():
    for size, expected in (
        ((400, 100), (128, 32)),
        ((20, 30), (20, 30)),
        ((4000, 3), (128, 1)),
        ((128, 128), (128, 128)),
    ):
        assert Image.open(io.BytesIO(thumbnail(Image.new("RGB", size), 128))).size == expected


def test_changed_settings_name_what_differs():
    config = json.loads(
        json.dumps(CurationConfig(balance=BalanceConfig(num_images=3)).__dict__, default=lambda o: o.__dict__)
    )
    config["execution"]["workers"] = 7
    assert changed_settings(config) == {"balance.num_images": 3}


def test_effective_number_counts_equal_clusters():
    assert balance_figures(np.array([[0, 1], [5, 4]]))["effective_number"] == pytest.approx(4)
    assert balance_figures(np.array([[0, 1], [9, 1]]))["effective_number"] == pytest.approx(1)
    assert balance_figures(np.array([[0, 2]]))["effective_number"] == 0


def test_balance_of_counted_sizes_is_that_of_the_sizes():
    sizes = np.random.default_rng(0).integers(0, 9, 500)
    figures = balance_figures(np.stack(np.unique(sizes, return_counts=True), axis=1))
    for name, value in balance(sizes)._asdict().items():
        assert figures[name] == pytest.approx(value), name


@pytest.mark.parametrize(
    ("basis", "sentences"),
    [
        ("exact", ["100%", "compare every image with every other"]),
        ("law", ["≥ 99.99%", "too few had a near-duplicate (12 pairs)"]),
        ("sample", ["99.46%", "7,000 randomly drawn images", "at least <b>99.12%</b> of all pairs (asked for: 99%)"]),
    ],
)
def test_recall_is_told_as_it_is_known(basis, sentences):
    figures = {"embedding pairs": 31_000, "similarity_threshold": 0.6, "basis": basis, "nprobe": 24}
    figures |= {"num_queries": 7000, "num_pairs": 12 if basis == "law" else 4321, "measured_recall": 0.9946}
    figures |= {"measured_lower_bound": 0.9999 if basis == "law" else 0.9912}
    text = sections.recall({"dedup": figures, "config": {"dedup": {"target_recall": 0.99}}})
    for sentence in ["31,000 pairs of images at or above cosine 0.6", *sentences]:
        assert sentence in text


def test_rank_chart_holds_for_flat_single_and_empty_sizes():
    for before, after in (
        ([(5, 3)], [(0, 3)]),
        ([(1, 1)], [(1, 1)]),
        ([(10**6, 1), (10, 1), (1, 1), (0, 1)], [(3, 1), (0, 3)]),
    ):
        svg = charts.rank_sizes(before, after)
        numbers = [float(x) for x in re.findall(r'(?:points|cx|cy)="([^"]+)"', svg) for x in re.split("[ ,]", x)]
        assert all(0 <= n <= 440 for n in numbers)
        assert ('class="line after"' in svg) == any(size for size, _ in after)


def test_map_keeps_groups_together_and_ignores_nothing_but_order():
    rng = np.random.default_rng(0)
    centres = np.eye(4, 32)
    rows = np.repeat(centres, 30, axis=0) + 0.08 * rng.standard_normal((120, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    points = neighbour_map(rows)
    np.testing.assert_array_equal(points, neighbour_map(rows))
    assert np.isfinite(points).all()
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    group = np.repeat(np.arange(4), 30)
    assert (group[distance.argmin(axis=1)] == group).mean() > 0.95
    with pytest.raises(ValueError, match="at least 3"):
        neighbour_map(rows[:2])


def test_principal_axes_of_a_known_plane():
    t = np.linspace(-1, 1, 11)
    rows = np.stack([3 * t, t**2, np.zeros(11)], axis=1)
    np.testing.assert_allclose(principal_axes(rows), np.stack([3 * t, t**2 - (t**2).mean()], axis=1), atol=1e-6)


def test_map_of_equal_rows_is_finite():
    assert np.isfinite(neighbour_map(np.ones((5, 3), np.float32) / np.sqrt(3, dtype=np.float32))).all()
