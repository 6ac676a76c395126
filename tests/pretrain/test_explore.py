"""The page to explore pictures with: what is chosen, what its figures are worth, and what it does in a browser."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.downstream.backbone import Backbone, ImageSettings, complete_settings, load_backbone
from pretrain.downstream.explore.__main__ import main
from pretrain.downstream.explore.pictures import choose, compact
from pretrain.downstream.export.folder import write_checked
from pretrain.downstream.pca import heat
from pretrain.downstream.pixels import find_sets, whole_picture
from pretrain.models.vision_transformer import VisionTransformer
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.pretrain.randomised import randomise

PX = 96
HOSTILE = [
    "<img src=x onerror=hacked=1>",
    "<!--<script>",
    "a & b 'c' \"d\"",
    "</script><script>hacked=1</script>",
    "{style}",
]
ERROR = 0.04
"""of a cosine, by 8 bits and fewer dimensions: the largest over all patches of these pictures"""
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = complete_settings("dinov3_vits16", {"embed_dim": 48, "depth": 2, "num_heads": 4})
    model = VisionTransformer(**settings).eval().requires_grad_(False)
    randomise(model)
    folder = tmp_path_factory.mktemp("backbone") / "export"
    write_checked(
        Backbone(model, ImageSettings(px=PX // 2), "dinov3_vits16", settings, "made here", {}),
        {},
        folder,
        "safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, half of them with hostile names; and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate([*HOSTILE, "five", "six", "seven"]):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, [(96, 96), (160, 100), (80, 170)][number % 3]).save(path)
    (folder / "bro<b>ken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    (folder / "notes.txt").write_text("beside the images")
    return folder


@pytest.fixture(scope="module")
def page(exported: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "new" / "page.html"
    assert main([str(exported), str(images), "-o", str(out), "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize(("there", "most"), [(3, 5), (5, 5), (9, 5), (10, 5), (100, 7), (64, 1)])
def test_the_choice_is_spread_over_the_set(tmp_path: Path, there: int, most: int) -> None:
    picture_tar(tmp_path / "a.tar", range(there // 3))
    picture_tar(tmp_path / "b.tar", range(there // 3, there))
    choice = choose(find_sets(f"{tmp_path}/*.tar"), most)
    numbers = [int(place.key[1:]) for place in choice.places]
    assert choice.of == there
    assert len(numbers) == min(there, most)
    assert numbers == sorted(set(numbers))
    if there > most > 1:
        steps = np.diff([*numbers, there])
        assert steps.max() <= 2 * steps.min() + 1


def test_a_set_that_is_cut_gives_what_it_has(tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture) -> None:
    content = picture_tar(tmp_path / "whole.tar", range(4)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: content.index(b"p0002.jpg") + 700])
    assert main([str(exported), str(tmp_path / "cut.tar"), "-o", str(tmp_path / "page.html"), "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert re.match(r"2 of 2 pictures in .*page.html, 0.\d MB; \d+ of 48 dimensions hold 9\d.\d% of", told.out)
    assert "damaged_shard" in told.err


def test_compact_rows_keep_their_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 20, generator=generator) @ torch.randn(20, 300, generator=generator)
    rows = F.normalize(rows + 0.1 * torch.randn(600, 300, generator=generator), dim=1)
    found = compact(list(rows.half().split(200)))
    assert len(found.values) <= 21
    assert found.kept > 0.99
    shown = found.values.T.astype(float) @ found.values.astype(float) * found.step**2
    errors = np.abs(shown - (rows @ rows.T).numpy())[~np.eye(600, dtype=bool)]
    assert errors.mean() < 0.01
    # What the page says of itself, of a draw of the pairs.
    assert found.mean_error == pytest.approx(errors.mean(), rel=0.05)
    assert found.high_error == pytest.approx(np.quantile(errors, 0.99), rel=0.05)


def test_no_name_becomes_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 5  # four of data and ours
    assert text.count("</script") == 5
    assert "<img src=x" not in text
    assert "<!--<" not in text
    assert "bro&lt;b&gt;ken" in text
    assert "http" not in text.replace("http-equiv", "")
    assert str(page.parents[2]) not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--px", "8"], "--px 8 is less than a patch of 16 px"),
        (["--px", "16"], "a PCA needs 4 patches"),
        (["--max-images", "0"], "--max-images 0 must be from 1 to 2,000"),
        (["-o", "page.png"], "page.png must end in .html"),
        (["--px", "30000"], "--px 30000 has more than 40,000 patches of 16 px; give a lower --px"),
    ],
)
def test_wrong_inputs(exported: Path, tmp_path: Path, capsys, options: list[str], message: str) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    assert main([str(exported), str(tmp_path / "one.png"), "-o", str(tmp_path / "page.html"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_too_many_patches_are_an_error_before_the_work(exported: Path, tmp_path: Path, capsys) -> None:
    tar = picture_tar(tmp_path / "x.tar", range(13))
    assert main([str(exported), str(tar), "-o", str(tmp_path / "page.html"), "--px", "3200"]) == 2
    told = capsys.readouterr().err
    assert "13 pictures at --px 3200 have 520,000 patches or more, and a page holds 500,000; lower" in told
    assert "embedding" not in told


def test_nothing_to_show(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", b"\xff\xd8\xff\xe0nothing"), ("b.jpg", encoded(picture(0))[:200])])
    assert main([str(exported), str(tar), "-o", str(tmp_path / "page.html")]) == 2
    assert "none of 2 images can be shown (not_an_image" in capsys.readouterr().err
    empty = write_tar(tmp_path / "y.tar", [("a.txt", b"no image")])
    assert main([str(exported), str(empty), "-o", str(tmp_path / "page.html")]) == 2
    assert "no image can be read" in capsys.readouterr().err


class Exact:
    """The same pictures, embedded and compared without the page."""

    def __init__(self, exported: Path, images: Path) -> None:
        backbone = load_backbone(exported)
        self.patches, self.grids, cls = {}, {}, {}
        for path in images.rglob("*.png"):
            pixels = torch.tensor(whole_picture(path.read_bytes(), PX, 16)).permute(2, 0, 1)[None]
            features = backbone.features(backbone.image.normalise(pixels))
            key = str(path.relative_to(images).with_suffix(""))
            self.grids[key] = features.grid
            self.patches[key] = F.normalize(features.patches[0], dim=1).numpy()
            cls[key] = F.normalize(features.cls[0], dim=0).numpy()
        self.cls = cls

    def cosines(self, key: str, row: int, column: int) -> dict[str, np.ndarray]:
        chosen = self.patches[key].reshape(*self.grids[key], -1)[row, column]
        return {other: (rows @ chosen).reshape(self.grids[other]) for other, rows in self.patches.items()}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_in_a_browser(page: Path, exported: Path, images: Path) -> None:
    from playwright.sync_api import sync_playwright

    exact = Exact(exported, images)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1300, "height": 1000}, offline=True)
        tab = context.new_page()
        wrong, asked = [], []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_selector("main:not([hidden])")

        def order() -> list[str]:
            return tab.locator("#tiles .name").all_text_contents()

        def wait_for(told: str) -> None:
            tab.wait_for_function("told => document.querySelector('#told').textContent.startsWith(told)", arg=told)

        def tile(key: str):
            return tab.locator("#tiles figure").nth(order().index(key))

        # Every name is text, and nothing of it ran.
        assert sorted(order()) == sorted(exact.grids)
        assert tab.evaluate("() => typeof hacked") == "undefined"

        # A click on a patch: its cosines as colours, the order by the best patch, the figure under the pointer.
        tab.select_option("[name=scale]", "fixed")
        key, (row, column) = "six", (2, 3)
        frame = tile(key).locator(".frame")
        frame.scroll_into_view_if_needed()
        box, (rows, columns) = frame.bounding_box(), exact.grids[key]
        assert box is not None
        frame.click(position={"x": box["width"] * (column + 0.5) / columns, "y": box["height"] * (row + 0.5) / rows})
        wait_for("Patch in row 3, column 4 of six.")
        cosines = exact.cosines(key, row, column)
        for other, expected in cosines.items():
            pixels = (
                tile(other)
                .locator("canvas")
                .evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
            )
            drawn = np.array(pixels).reshape(*expected.shape, 4)[..., :3]
            # The page's cosines move by up to ERROR, and a colour by up to 450 levels from cosine 0 to 1.
            assert np.abs(drawn - heat(expected, 0, 1).astype(int)).max() < 450 * ERROR, other
        best = [cosines[other].max() for other in order()]
        assert order()[0] == key
        assert (np.diff(best) < 2 * ERROR).all()
        assert len({round(value, 1) for value in best}) > 1
        other = order()[1]
        place = np.unravel_index(cosines[other].argmax(), cosines[other].shape)
        tile(other).locator(".frame").focus()
        tab.keyboard.press("ArrowRight")  # begins at the best patch
        assert f"row {place[0] + 1}, column {place[1] + 1}" in tab.locator("#tip").text_content()
        told = float(tab.locator("#tip").text_content().split(" · ")[0].replace("−", "-"))
        assert told == pytest.approx(cosines[other].max(), abs=ERROR)

        # The keyboard chooses, and Back takes it back.
        tab.keyboard.press("Enter")
        wait_for(f"Patch in row {place[0] + 1}, column {place[1] + 1} of {other}.")
        assert order()[0] == other
        assert tab.evaluate("document.activeElement.className") == "frame"
        tab.go_back()
        wait_for("Patch in row 3, column 4 of six.")

        # Search by example: the order of CLS.
        example = HOSTILE[0]
        tile(example).get_by_role("button", name="similar pictures").click()
        wait_for(f"Pictures like {example}.")
        ranks = sorted(exact.cls, key=lambda k: -float(exact.cls[k] @ exact.cls[example]))
        assert order() == ranks
        scores = [float(text.replace("−", "-")) for text in tab.locator("#tiles output").all_text_contents()]
        assert np.allclose(scores, [exact.cls[k] @ exact.cls[example] for k in ranks], atol=0.006)

        # In the order of the set; colours instead of heat.
        tab.select_option("[name=order]", "set")
        tab.check("[value=colours]")
        assert order() == sorted(order())
        assert tile("five").locator("canvas").is_visible()
        tab.check("[value=nothing]")
        assert not tile("five").locator("canvas").is_visible()

        # On a telephone nothing is wider than the screen.
        tab.set_viewport_size({"width": 360, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert not wrong
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
        browser.close()
