"""The Space's page in a real browser: Debian's chromium, driven by Playwright."""

import shutil
from pathlib import Path

import pytest
from conftest import draw_image

import inference

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium: `apt-get install chromium`", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, space):
    """Opens the page with these settings; at the end, nothing may be in its console."""
    contexts, errors = [], []

    def open(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(space)
        playwright.expect(page.locator("#figure img")).to_be_visible(timeout=20_000)
        return page

    yield open
    for context in contexts:
        context.close()
    assert errors == []


def shown(page) -> str:
    return page.locator("#figure img").get_attribute("src")


def changes(page, what: str) -> None:
    """Wait until the map is not the one it was."""
    playwright.expect(page.locator("#figure img")).not_to_have_attribute("src", what)


def upload(page, path: Path) -> None:
    """As a person would: take away the picture that is there, and choose a file."""
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.locator("#picture input[type=file]").first.set_input_files(path)


def test_it_opens_on_an_answered_example(open_page):
    page = open_page()
    assert page.locator("#answer tr").count() == 10
    assert page.locator("#layers button").count() == 2
    assert "of 360 images" in page.locator("#about").inner_text()
    assert "/me/digits/tree/" in page.locator("#about a").get_attribute("href")


def test_a_picture_is_uploaded_and_answered(open_page, tmp_path):
    page = open_page()
    before = shown(page)
    draw_image(0, (60, 40)).save(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    changes(page, before)
    assert page.locator("#answer .verdict").inner_text()


def test_a_bad_picture_is_answered_in_a_sentence_and_an_example_then_works(open_page, tmp_path):
    page = open_page()
    (tmp_path / "text.png").write_text("This is no picture.")
    upload(page, tmp_path / "text.png")
    alert = page.get_by_role("alert").filter(has_text="no picture that can be read")
    playwright.expect(alert).to_be_visible()
    page.get_by_role("button", name=f"Example: {inference.EXAMPLES[4].stem}").click()
    playwright.expect(page.locator("#figure img")).to_be_visible()
    assert page.locator("#answer tr").count() == 10


def test_methods_layers_heads_and_classes_redraw_the_map(open_page):
    page = open_page()
    for method in ("One head", "Relevance", "Rollout", "Mean of a layer"):
        before = shown(page)
        page.get_by_label(method).check()
        changes(page, before)
    page.get_by_label("One head").check()
    for name in ("Layer", "Head"):
        before = shown(page)
        page.get_by_role("slider", name=name).press("Home" if name == "Layer" else "End")
        changes(page, before)
    before = shown(page)
    page.get_by_role("button", name="Layer 1,").click()
    changes(page, before)
    page.get_by_label("Relevance").check()
    caption = page.locator("#figure figcaption")
    for label in ("7", "2"):
        page.get_by_label("What speaks for").click()
        page.get_by_role("option", name=label).click()
        playwright.expect(caption).to_contain_text(f"“{label}”")


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.title || e.getAttribute('aria-label') || e.name || e.tagName)"
                "(document.activeElement)"
            )
        )
    assert {f"Example: {p.stem}" for p in inference.EXAMPLES} <= reached
    before = shown(page)
    page.get_by_role("button", name=f"Example: {inference.EXAMPLES[5].stem}").focus()
    page.keyboard.press("Enter")
    changes(page, before)
    page.get_by_label("Rollout").focus()
    page.keyboard.press("Tab")  # gradio's radio buttons are a stop each
    page.keyboard.press("Space")
    playwright.expect(page.locator("#figure figcaption")).to_contain_text("What speaks for")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_light_and_dark(open_page, scheme):
    page = open_page(color_scheme=scheme)
    text, ground = page.evaluate(
        "[getComputedStyle(document.querySelector('#intro h1')).color,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    text, ground = (luminance(color) for color in (text, ground))
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 7
    assert (ground < 0.2) == (scheme == "dark")


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for image in page.locator("img").all():
        box = image.bounding_box()
        assert box is None or box["x"] + box["width"] <= 391


def test_every_picture_has_a_text_alternative(open_page):
    page = open_page()
    for image in page.locator("#figure img, #layers img, #examples img, #picture img").all():
        assert image.get_attribute("alt")


def luminance(color: str) -> float:
    """Relative luminance of a CSS colour, as WCAG 2 defines it."""
    parts = [float(p) / 255 for p in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
