"""The Space's page in a real browser: what is shown belongs to the picture and the controls."""

import io
import shutil
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

import inference
import wording
from bad_pictures import write_bad_pictures
from inference import Classifier
from pipeline.explain import attention
from samples import draw_image

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium: `apt-get install chromium`", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright")
pytestmark = pytest.mark.slow

EXAMPLES = {path.stem: path for path in inference.EXAMPLES}
del EXAMPLES["apple"], EXAMPLES["mountain"]  # which the model does not know
CONTROLS = {"method": "mean", "layer": 1, "head": 0, "label": ""}  # as the page opens


@pytest.fixture(scope="module")
def classifier(cifar_folder) -> Classifier:
    """The model of the Space that the page is of, which computes in float32 too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPACES_ZERO_GPU", "1")
        return Classifier(str(cifar_folder))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, space_url):
    """Open the page with these settings; at the end, its console must be free of errors."""
    contexts, errors = [], []

    def open_with(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(space_url)
        playwright.expect(page.locator("#map img")).to_be_visible(timeout=20_000)
        return page

    yield open_with
    for context in contexts:
        context.close()
    assert errors == []


def example(page, name: str):
    return page.locator("#examples button").filter(has_text=name)


def upload(page, path: Path) -> None:
    """Remove the picture and choose a file, as a person would."""
    page.get_by_label("Remove Image").click()
    page.locator("#picture input[type=file]").first.set_input_files(path)


def save_picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    """Save a smooth picture, which changes little when it is compressed."""
    draw_image(seed, (6, 4)).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def await_idle(page) -> None:
    """Wait until no event has run for half a second."""
    trackers = "[...document.querySelectorAll('[data-testid=status-tracker]')]"
    idle = f"{trackers}.every(tracker => tracker.matches('.hide'))"
    for _ in range(5):
        page.wait_for_function(idle, timeout=20_000)
        page.wait_for_timeout(100)


def expect_shown(page, classifier: Classifier, path: Path, **controls) -> None:
    """Check that all that is shown is computed from this picture at these controls."""
    await_idle(page)
    controls = CONTROLS | controls
    prediction = classifier.predict_file(path)
    assert page.locator("#verdict").inner_text() == wording.answer(classifier, prediction)
    values = classifier.select_map(prediction, **controls)
    assert_image(page.locator("#map img"), attention.overlay(prediction.picture, values, 448))
    method, label = controls.pop("method"), controls.pop("label")
    label = label or next(iter(prediction.probs))
    text = wording.METHODS[method][1].format(**controls, label=label)
    assert page.locator("#caption").inner_text().startswith(text)
    assert page.locator("#map img").get_attribute("alt") == text
    for layer, tile in enumerate(page.locator("#layers img").all()):
        mean = classifier.select_map(prediction, "mean", layer)
        assert_image(tile, attention.overlay(prediction.picture, mean, 160))


def assert_image(image, expected: Image.Image) -> None:
    """Check a picture on the page, which was compressed on its way."""
    shown = Image.open(io.BytesIO(urlopen(image.get_attribute("src")).read())).convert("RGB")
    assert shown.size == expected.size
    difference = np.asarray(shown, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).mean() < 4


def test_it_opens_with_an_example_and_its_prediction(open_page, classifier):
    page = open_page()
    expect_shown(page, classifier, EXAMPLES["airplane"])
    assert page.title() == "CIFAR-10 classifier with attention maps"
    assert page.locator("#layers img").count() == 2
    assert "on 360 test images" in page.content()


def test_an_uploaded_picture_is_predicted(open_page, classifier, tmp_path):
    page = open_page()
    picture = save_picture(tmp_path / "mine.png", 0, (120, 80))
    upload(page, picture)
    expect_shown(page, classifier, picture)


def test_of_two_examples_clicked_100_ms_apart_the_second_is_shown(open_page, classifier):
    page = open_page()
    for first, second in (("cat", "ship"), ("frog", "truck"), ("horse", "airplane")):
        example(page, first).click()
        page.wait_for_timeout(100)
        example(page, second).click()
        expect_shown(page, classifier, EXAMPLES[second])


def test_of_two_examples_clicked_100_ms_apart_the_second_is_shown_over_a_slow_connection(
    open_page, classifier
):
    page = open_page()

    def delay(route):
        page.wait_for_timeout(250)
        route.continue_()

    page.route("**/queue/join*", delay)
    page.evaluate(
        """() => {
            const tiles = document.querySelectorAll("#examples button");
            tiles[3].click();
            setTimeout(() => tiles[6].click(), 100);
        }"""
    )
    page.wait_for_timeout(2000)
    page.unroute("**/queue/join*")
    expect_shown(page, classifier, EXAMPLES["ship"])


def test_the_map_follows_method_layer_head_and_class(open_page, classifier):
    page = open_page()
    cat = EXAMPLES["cat"]
    example(page, "cat").click()
    for name, method in [(name, m) for m, (name, _) in wording.METHODS.items()][:3]:
        page.get_by_label(name).check()
        expect_shown(page, classifier, cat, method=method)
    page.get_by_label("Single head").check()
    page.get_by_role("slider", name="Layer").press("Home")
    page.get_by_role("slider", name="Head").press("End")
    expect_shown(page, classifier, cat, method="head", layer=0, head=1)
    page.get_by_label("Class relevance").check()
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="frog").click()
    expect_shown(page, classifier, cat, method="relevance", layer=0, head=1, label="frog")
    page.locator("#layers button").nth(1).click()
    expect_shown(page, classifier, cat, method="mean", layer=1, head=1, label="frog")


def test_a_click_on_a_layer_shows_it_whatever_was_shown_before(open_page, classifier):
    page = open_page()
    layers = page.locator("#layers button")
    for layer in (0, 1, 0, 1):
        page.get_by_label("Class relevance").check()
        await_idle(page)
        layers.nth(layer).click()
        expect_shown(page, classifier, EXAMPLES["airplane"], layer=layer)


def test_a_new_picture_is_shown_at_the_current_controls(open_page, classifier, tmp_path):
    page = open_page()
    page.get_by_label("Single head").check()
    page.get_by_role("slider", name="Layer").press("Home")
    page.get_by_role("slider", name="Head").press("End")
    example(page, "dog").click()
    expect_shown(page, classifier, EXAMPLES["dog"], method="head", layer=0, head=1)
    picture = save_picture(tmp_path / "mine.png", 1, (80, 120))
    upload(page, picture)
    expect_shown(page, classifier, picture, method="head", layer=0, head=1)


def test_a_control_moved_while_a_picture_is_on_its_way_counts_for_that_picture(
    open_page, classifier
):
    page = open_page()
    page.evaluate(
        """() => {
            document.querySelectorAll("#examples button")[6].click();
            document.querySelector("input[value=rollout]").click();
        }"""
    )
    expect_shown(page, classifier, EXAMPLES["ship"], method="rollout")


def test_clearing_the_picture_clears_all_that_was_computed_from_it(open_page, classifier):
    page = open_page()
    page.get_by_label("Remove Image").click()
    await_idle(page)
    assert page.locator("#verdict").inner_text() == "Upload a picture or choose an example."
    assert page.locator("#map img").count() == 0
    assert page.locator("#layers img").count() == 0
    assert page.locator("#caption").inner_text().strip() == ""
    assert page.locator(".confidence-set").count() == 0
    page.get_by_label("Rollout").check()
    await_idle(page)
    assert page.locator("#map img").count() == 0
    example(page, "cat").click()
    expect_shown(page, classifier, EXAMPLES["cat"], method="rollout")


def test_a_bad_picture_gets_a_sentence_and_an_example_then_works(open_page, classifier, tmp_path):
    page = open_page()
    for path, message in write_bad_pictures(tmp_path).items():
        if path.name in ("text.png", "cut.jpg", "large.png"):
            upload(page, path)
            playwright.expect(page.get_by_role("status").filter(has_text=message)).to_be_visible()
            assert page.locator("#map img").count() == 0
    example(page, "frog").click()
    expect_shown(page, classifier, EXAMPLES["frog"])


def test_the_opacity_slider_fades_the_map(open_page, classifier):
    page = open_page()
    page.get_by_role("slider", name="Opacity").press("Home")
    await_idle(page)
    prediction = classifier.predict_file(EXAMPLES["airplane"])
    plain = attention.overlay(prediction.picture, np.ones((4, 4)), 448)
    assert_image(page.locator("#map img"), plain)


def test_the_keyboard_is_enough(open_page, classifier):
    page = open_page()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText.trim()"))
    assert set(EXAMPLES) <= reached
    example(page, "dog").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("Tab")
    assert page.evaluate(outline) != "none"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect_shown(page, classifier, EXAMPLES["dog"])
    page.get_by_label("Single head").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect_shown(page, classifier, EXAMPLES["dog"], method="rollout")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_light_and_dark(open_page, scheme):
    page = open_page(color_scheme=scheme)
    for selector in ("h1", "#verdict p", "#caption"):
        text, ground = page.evaluate(
            f"""() => {{
                const element = document.querySelector("{selector}");
                return [getComputedStyle(element).color,
                        getComputedStyle(document.body).backgroundColor];
            }}"""
        )
        text, ground = luminance(text), luminance(ground)
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 7
        assert (ground < 0.2) == (scheme == "dark")


def luminance(color: str) -> float:
    """Return the relative luminance of a CSS color, as WCAG 2 defines it."""
    parts = [float(p) / 255 for p in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    await_idle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for image in page.locator("#picture img, #examples img, #map img, #layers img").all():
        box = image.bounding_box()
        assert box["x"] + box["width"] <= 391
    for button in page.locator("#examples button, #layers button, #picture button").all():
        box = button.bounding_box()
        assert box is None or min(box["width"], box["height"]) >= 24


def test_every_picture_has_a_text_alternative(open_page):
    page = open_page()
    await_idle(page)
    images = page.locator("#picture img, #examples img, #map img, #layers img").all()
    assert len(images) == 1 + 8 + 1 + 2
    for image in images:
        assert image.get_attribute("alt")


@pytest.mark.parametrize(
    "settings",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    ],
    ids=["light", "dark", "phone"],
)
def test_axe_core_has_no_serious_finding(open_page, settings):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(**settings)
    page.get_by_role("button", name="More classes").click()
    page.get_by_label("Class relevance").check()
    await_idle(page)
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], node["html"][:200]) for v in serious for node in v["nodes"]] == []
