"""The report in a browser, from disk: it renders, fetches nothing, runs nobody's script, and shows only what it may."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import write
from tests.browser.conftest import Visit, Visitor
from tests.cards import make_card
from tests.unit.test_report import HOSTILE, hostile_card, on_disk, row

PAGES = ("one", "two", "three", "suites", "bare", "hostile", "gaps", "apart")
PHONE = 360
UNSAFE = 6  # images of unsafe prompts that a card of tests.cards has in its gallery

BLURRED = "[...document.querySelectorAll('.veil img')].map(e => getComputedStyle(e).filter.includes('blur('))"

# Contrast of every text that is drawn with what is behind it (WCAG 2.2, relative luminance), the lowest first.
CONTRASTS = """() => {
  const light = (c) => { const v = c / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return rgba(getComputedStyle(document.documentElement).backgroundColor);
  };
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {
    const words = [...e.childNodes].filter((n) => n.nodeType === 3 && n.textContent.trim());
    if (!words.length || !e.checkVisibility() || ['SCRIPT', 'TITLE', 'title'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const colour = rgba(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(colour), luminance(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName + '.' + (e.getAttribute('class') || ''), words[0].textContent]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    base, adapted, worse = make_card(), make_card("adapted", 1, shift=-0.3), make_card("alpha 0", 2, shift=0.3)
    quality = [make_card(label, seed, suite="quality") for seed, label in enumerate(("base", "adapted"))]
    bare = replace(base, sweeps={}, groups={}, gallery=[], counts={}, samples={})
    apart = replace(adapted, protocol={**adapted.protocol, "steps": 20})
    training = [row(step, 0.5 - step / 200, 0.6, best=step == 40) for step in range(0, 61, 10)]
    cards = {
        "one": (base,),
        "two": (base, adapted),
        "three": (base, adapted, worse),
        "suites": (base, adapted, *quality),
        "bare": (bare,),
        "hostile": (hostile_card(), hostile_card("adapted", 1)),
        "gaps": (base, adapted),
        "apart": (base, apart),
    }
    assert tuple(cards) == PAGES
    found = {}
    for name, own in cards.items():
        sources = on_disk(folder / name, *own)
        if name == "gaps":
            (sources[1][0] / adapted.gallery[0]["file"]).unlink()
        title = HOSTILE[0] if name == "hostile" else f"Report: {name}"
        found[name] = write(sources, folder / f"{name}.html", title, training if name == "two" else ())
    return found


def style(visit: Visit, selector: str, name: str) -> Any:
    return visit.run(f"getComputedStyle(document.querySelector({selector!r})).{name}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_from_disk_without_an_error_or_a_request(
    visit: Visitor, reports: dict[str, Path], name: str, scheme: str
) -> None:
    found = visit(reports[name], scheme=scheme)
    found.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    found.run("document.querySelectorAll('button').forEach(e => e.click())")
    assert found.said == []
    assert [url for url in found.asked if not url.startswith("data:")] == [reports[name].as_uri()]
    assert found.run("[...document.images].every(e => e.complete && e.naturalWidth > 0)")


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_never_scrolls_sideways(visit: Visitor, reports: dict[str, Path], name: str) -> None:
    found = visit(reports[name], width=PHONE)
    assert found.run("document.documentElement.scrollWidth") <= PHONE
    found.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert found.run("document.documentElement.scrollWidth") <= PHONE


def test_texts_of_others_run_nothing_and_stay_what_they_are(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["hostile"])
    assert found.run("window.hacked") is None
    assert found.page.title() == HOSTILE[0]
    prompts = found.page.locator(".prompt").all_text_contents()
    assert prompts[:8] == list(HOSTILE[:8])
    assert found.run("document.scripts.length") == found.run("document.styleSheets.length") == 1
    assert all(found.run(BLURRED)), "a style in a prompt does not take the blur away"


def test_the_policy_stops_what_escaping_would_have_let_through(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"])
    found.run("""() => {
        document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.hacked = 1">');
        document.body.insertAdjacentHTML('beforeend', '<img src="https://example.org/x.png">');
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        document.body.append(script);
    }""")
    found.page.wait_for_function("document.images[document.images.length - 1].complete")
    assert found.run("window.hacked") is None
    assert sum("Content Security Policy" in line for line in found.said) >= 3


# ---- what is blurred -------------------------------------------------------------------------------------------------


def test_images_of_unsafe_prompts_and_no_others_are_blurred(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"])
    assert found.run(BLURRED) == [True] * 2 * UNSAFE
    assert found.run("[...document.querySelectorAll('.open img')].map(e => getComputedStyle(e).filter)") == ["none"] * (
        2 * UNSAFE
    )


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_click_or_a_key_shows_one_image_and_hides_it_again(
    visit: Visitor, reports: dict[str, Path], key: str
) -> None:
    found = visit(reports["two"])
    veils = found.page.locator(".veil")
    veils.nth(1).click()
    assert found.run(BLURRED) == [i != 1 for i in range(2 * UNSAFE)]
    assert veils.nth(1).get_attribute("aria-pressed") == "true"
    veils.nth(1).click()
    veils.nth(2).focus()
    found.page.keyboard.press(key)
    assert found.run(BLURRED) == [i != 2 for i in range(2 * UNSAFE)]
    found.page.keyboard.press(key)
    assert all(found.run(BLURRED))


def test_a_control_and_the_escape_key_blur_everything_again(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["suites"])
    again = (lambda: found.page.locator(".blur-all").first.click(), lambda: found.page.keyboard.press("Escape"))
    for blur in again:
        for veil in found.page.locator(".veil").all():
            veil.click()
        assert not any(found.run(BLURRED))
        blur()
        assert len(found.run(BLURRED)) == 4 * UNSAFE and all(found.run(BLURRED))


def test_every_image_button_can_be_reached_with_the_keyboard_alone(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"])
    found.page.locator(".blur-all").focus()
    for number in range(2 * UNSAFE):
        found.page.keyboard.press("Tab")
        while not found.run("document.activeElement.matches('.veil')"):
            found.page.keyboard.press("Tab")  # what scrolls can be reached too
        assert found.run("[...document.querySelectorAll('.veil')].indexOf(document.activeElement)") == number


def test_paper_shows_no_image_of_an_unsafe_prompt(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"])
    for veil in found.page.locator(".veil").all():
        veil.click()
    found.page.emulate_media(media="print")
    assert all(found.run(BLURRED))
    assert style(found, ".veil img", "visibility") == "hidden"
    assert style(found, ".open img", "visibility") == "visible"


def test_without_scripts_everything_is_there_and_stays_blurred(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"], scripts=False)
    found.page.locator(".veil").first.click()
    assert found.run(BLURRED) == [True] * 2 * UNSAFE
    assert not found.page.locator(".controls").is_visible()
    assert "they stay blurred" in found.page.locator("noscript").inner_text()


def test_filters_leave_the_rows_that_they_name(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"])
    rows = found.page.locator(".row")
    total = rows.count()
    for name, told in (("flagged", "flagged"), ("changed", "changed"), ("all", "")):
        button = found.page.locator(f"[data-filter={name}]")
        button.click()
        expected = found.page.locator(f".row[data-{told}=yes]").count() if told else total
        assert found.page.locator(".row:visible").count() == expected == int(button.locator(".num").inner_text())
        assert button.get_attribute("aria-pressed") == "true"
        assert found.page.locator("[data-filter][aria-pressed=true]").count() == 1
        assert f"{expected} of {total}" in found.page.locator(".status").inner_text()
    assert 0 < found.page.locator(".row[data-changed=yes]").count() < total


# ---- how it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["three", "apart", "gaps"])
def test_every_text_has_enough_contrast(visit: Visitor, reports: dict[str, Path], name: str, scheme: str) -> None:
    found = visit(reports[name], scheme=scheme)
    found.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    contrasts = found.run(CONTRASTS)
    assert len(contrasts) > 100
    assert contrasts[0][0] >= 4.5, f"below WCAG AA: {contrasts[:3]}"


def test_light_and_dark_follow_the_reader(visit: Visitor, reports: dict[str, Path]) -> None:
    grounds = [style(visit(reports["two"], scheme=scheme), "body", "backgroundColor") for scheme in ("light", "dark")]
    assert grounds[0] != grounds[1]


def test_charts_lie_inside_the_page_and_their_labels_inside_the_charts(
    visit: Visitor, reports: dict[str, Path]
) -> None:
    for width in (PHONE, 768, 1280):
        found = visit(reports["two"], width=width)
        outside = found.run("""() => [...document.querySelectorAll('.plot, .panel')].flatMap((box) => {
            const edge = box.getBoundingClientRect();
            return [...box.querySelectorAll('svg text')].filter((text) => {
                const own = text.getBoundingClientRect();
                return own.width && (own.left < edge.left - 1 || own.right > edge.right + 1
                    || own.top < edge.top - 1 || own.bottom > edge.bottom + 1);
            }).map((text) => text.textContent);
        })""")
        assert outside == []


def test_small_images_are_enlarged_pixel_by_pixel(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["two"])
    assert style(found, ".picture img", "imageRendering") == "pixelated"
    assert found.run("document.querySelector('.picture img').getBoundingClientRect().width") > 150


def test_a_missing_image_is_a_gap_that_is_named(visit: Visitor, reports: dict[str, Path]) -> None:
    found = visit(reports["gaps"])
    gap = found.page.get_by_role("img", name="No image of adapted for number 0: the file is missing")
    assert gap.is_visible() and "1 image is missing" in found.page.locator("main").inner_text()
