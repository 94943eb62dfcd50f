"""The report as a file, without a browser: what is in it, what cannot get into it, and what cannot be made of it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.card import Card
from evaluation.comparison import compare
from evaluation.report import charts, figures, gallery, page, write
from tests.cards import make_card, write_card

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "'><svg onload=window.hacked=1>",
    "</script><script>window.hacked = 1</script>",
    "</style><style>.veil img { filter: none !important }</style>",
    "{{7*7}} {% raw %} ${7*7}",
    "&lt;b&gt; &amp;amp; <!-- <b>",
    "javascript:window.hacked=1",
    "right-to-left \u202egnp.exe\u202c and \u2066isolated",
    "long" * 300,
    "half a pair \ud800, NUL \0, ESC \x1b[2J, line\u2028break",
    "صورة آمنة 安全な画像 🦊",
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    parts: list[Element | str] = field(default_factory=list)

    def all(self, tag: str = "", of: str = "") -> list[Element]:
        """Descendants of this tag and class, in document order."""
        found: list[Element] = []
        for child in self.parts:
            if isinstance(child, str):
                continue
            if (not tag or child.tag == tag) and (not of or of in child.attributes.get("class", "").split()):
                found.append(child)
            found += child.all(tag, of)
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def inside(self, of: str) -> bool:
        return of in self.attributes.get("class", "").split() or (self.parent is not None and self.parent.inside(of))


class Tree(HTMLParser):
    """The elements of a page; a page whose elements are not properly nested fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(html)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.parts.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.parts.append(Element(tag, {name: value or "" for name, value in attrs}, self.here))

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.parts.append(data)


def parsed(file: Path) -> Element:
    return Tree(file.read_text(encoding="utf-8")).root


def on_disk(folder: Path, *cards: Card) -> list[tuple[Path, Card]]:
    """The cards in folders of their own, with their images."""
    sources = []
    for number, card in enumerate(cards):
        write_card(folder / f"card{number}", card)
        sources.append((folder / f"card{number}", card))
    return sources


def pair(**changes: Any) -> tuple[Card, Card]:
    return make_card(**changes), make_card("adapted", 1, shift=-0.3, **changes)


def hostile_card(label: str = "base", seed: int = 0) -> Card:
    """Every text of it that can come from somebody else is an attack."""
    card = make_card(label, seed)
    entries = [
        {**entry, "prompt": HOSTILE[i % len(HOSTILE)], "labels": [HOSTILE[-i]], "seen": [HOSTILE[i % len(HOSTILE)]]}
        for i, entry in enumerate(card.gallery)
    ]
    bad = dict(zip(HOSTILE, HOSTILE, strict=True))
    figure = card.figures["inappropriate_rate"]
    bare = {key: value for key, value in figure.items() if key not in ("title", "better")}
    return replace(
        card,
        label=f"{label} {HOSTILE[1]}",
        suite=HOSTILE[0],
        created=HOSTILE[0],
        protocol={**bad, "detectors": {"nudenet": bad}},
        model={"path": HOSTILE[1], "sha256": HOSTILE[2], "adapter": {"source": HOSTILE[3], "checksum": HOSTILE[8]}},
        software=bad,
        figures={**card.figures, **{text: {**figure, "title": text} for text in HOSTILE}},
        groups={text: {text: bare} for text in HOSTILE},
        sweeps=dict.fromkeys(HOSTILE, card.sweeps["inappropriate_rate"]),
        counts=dict.fromkeys(HOSTILE, 1),
        gallery=entries,
    )


def saved(folder: Path, image: np.ndarray, name: str = "0.png", **options: Any) -> dict[str, Any]:
    """An entry of a gallery whose image is in `folder`."""
    Image.fromarray(image).save(folder / name, **options)
    return {"index": 0, "file": name, "prompt": "a fox", "labels": [], "unsafe": False, "seen": []}


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_page_fetches_nothing_and_its_policy_allows_its_own_style_and_script_alone(tmp_path: Path) -> None:
    found = parsed(write(on_disk(tmp_path, *pair()), tmp_path / "page.html", "Page"))
    metas = [meta.attributes for meta in found.all("meta")]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (element,) = found.all(tag)
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert not re.search(r"url\(|@import", found.all("style")[0].text)
    assert not re.search(r"fetch|XMLHttpRequest|import|http", found.all("script")[0].text)
    for element in found.all():
        assert not {name for name in element.attributes if name.startswith("on") or name == "style"}
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = element.attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,", "data:image/webp;base64,"))


def test_links_inside_a_page_lead_somewhere_and_ids_are_unique(tmp_path: Path) -> None:
    sources = on_disk(tmp_path, *pair(), *pair(suite="quality"))
    for chosen in (sources[:1], sources[:2], sources):
        found = parsed(write(chosen, tmp_path / "page.html", "Page"))
        ids = [element.attributes["id"] for element in found.all() if "id" in element.attributes]
        assert len(ids) == len(set(ids))
        links = {link.attributes["href"].removeprefix("#") for link in found.all("a")}
        named = {element.attributes.get("aria-labelledby") for element in found.all()} - {None}
        assert links | named <= set(ids)


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    cards = (hostile_card(), hostile_card("adapted", 1))
    tame = parsed(write(on_disk(tmp_path / "tame", *pair()), tmp_path / "tame.html", "Page"))
    file = write(on_disk(tmp_path, *cards), tmp_path / "page.html", HOSTILE[3])
    found = parsed(file)
    assert {element.tag for element in found.all()} <= {element.tag for element in tame.all()}
    assert len(found.all("script")) == len(found.all("style")) == 1
    known = {name for element in tame.all() for name in element.attributes}
    assert {name for element in found.all() for name in element.attributes} <= known
    prompts = [element.text for element in found.all("p", "prompt")]
    assert prompts[:8] == list(HOSTILE[:8])
    assert prompts[8] == r"right-to-left \u202egnp.exe\u202c and \u2066isolated"
    assert r"half a pair \ud800, NUL \x00, ESC \x1b[2J, line\u2028break" in prompts
    assert HOSTILE[-1] in prompts
    assert found.all("title")[0].text == found.all("h1")[0].text == HOSTILE[3]


def test_equal_cards_give_equal_pages(tmp_path: Path) -> None:
    sources = on_disk(tmp_path, *pair())
    pages = [write(sources, tmp_path / name / "page.html", "Page").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_made_leaves_the_old_one_and_nothing_half_written(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    with pytest.raises(ValueError, match="at least one card"):
        write([], file, "Page")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write(on_disk(tmp_path, make_card()), tmp_path / "taken", "Page")
    assert file.read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_image_of_a_page_has_a_text_and_every_table_its_headings(tmp_path: Path) -> None:
    found = parsed(write(on_disk(tmp_path, *pair()), tmp_path / "page.html", "Page"))
    assert all(image.attributes["alt"] for image in found.all("img"))
    assert all(chart.attributes["aria-label"] for chart in found.all("svg", "plane"))
    assert all(table.all("th") for table in found.all("table"))
    levels = [int(element.tag[1]) for element in found.all() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_page_reads_differences_as_the_comparison_does(tmp_path: Path) -> None:
    cards = pair(n=200)
    found = parsed(write(on_disk(tmp_path, *cards), tmp_path / "page.html", "Page"))
    readings = {row.name: row.differences[0].reading for row in compare(cards).rows if row.differences[0]}
    assert set(readings.values()) == {"better", "not clear"}
    (table,) = found.all("table", "figures")
    chips = [chip.text for chip in table.all("span", "chip")]
    assert [chip.split(maxsplit=2)[2] for chip in chips] == list(readings.values())
    assert chips[0].startswith("▼ −0.")
    better = table.all("span", "better")
    assert len(better) == 1 and "p <0.001" in table.text


def test_no_difference_is_called_better_or_worse_across_protocols(tmp_path: Path) -> None:
    base, adapted = pair()
    other = replace(adapted, protocol={**adapted.protocol, "steps": 20})
    found = parsed(write(on_disk(tmp_path, base, other), tmp_path / "page.html", "Page"))
    assert not found.all("span", "chip")
    (warning,) = found.all("div", "warning")
    assert "steps 50 / 20" in warning.text
    (row,) = found.all("tr", "differs")
    assert [cell.text for cell in row.all("td")] == ["50", "20"] and row.all("th")[0].text == "steps differs"


def test_a_long_list_that_differs_past_what_is_shown_is_marked() -> None:
    lists = [[*range(1000), last] for last in (1, 2)]
    (fact,) = page.facts([{"seeds": one} for one in lists])
    assert fact.values[0] == fact.values[1] and fact.differs


@pytest.mark.parametrize("empty", ["sweeps", "groups", "gallery", "counts", "samples"])
def test_a_card_may_lack(tmp_path: Path, empty: str) -> None:
    none: Any = [] if empty == "gallery" else {}
    cards = pair(**{empty: none})
    for chosen in (cards, cards[:1], (cards[0], make_card("adapted", 1)), (make_card(), cards[1])):
        parsed(write(on_disk(tmp_path, *chosen), tmp_path / "page.html", "Page"))


def test_a_figure_without_an_interval_is_shown_without_one(tmp_path: Path) -> None:
    card = make_card("one", n=1)
    fid = {"value": 31.25, "low": None, "high": None, "standard_error": None, "n": 1, "title": "FID", "better": "lower"}
    bare = {key: value for key, value in fid.items() if key not in ("title", "better")}
    swept = {"at": 0.5, "thresholds": [0.5, 0.6], "figures": [bare, bare]}
    figures = {**card.figures, "fid": fid}
    card = replace(card, figures=figures, groups={"kind": {"x": bare}}, sweeps={"fid": swept})
    found = parsed(write(on_disk(tmp_path, card), tmp_path / "page.html", "Page"))
    assert "31.25" in found.text and "None" not in found.text


def test_cards_of_several_suites_with_one_label_are_one_model(tmp_path: Path) -> None:
    i2p, quality = pair(), pair(suite="quality")
    found = parsed(write(on_disk(tmp_path, *i2p, *quality), tmp_path / "page.html", "Page"))
    assert "2 models on i2p, quality" in found.text
    twice = parsed(write(on_disk(tmp_path, i2p[0], i2p[0]), tmp_path / "page.html", "Page"))
    assert "base (2)" in twice.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.7857, "0.786"), (-0.0001, "0.000"), (-0.5, "−0.500"), (31.254, "31.25"), (47030, "47,030"),
     (1234.56, "1,234.6"), (None, "–"), (float("inf"), "–")],
)  # fmt: skip
def test_numbers_have_as_many_decimals_as_their_size_calls_for(value: Any, text: str) -> None:
    assert figures.number(value) == text


# ---- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0], [0.254, 0.262], [0.0], [1.0], [0.5], [37.35], [-3.0, 4.0], [1e-9, 2e-9], [1e6, 3e6], [], [None, 0.3]],
)
@pytest.mark.parametrize("zero", ["always", "near", "never"])
def test_an_axis_holds_its_values_between_round_ticks(values: list[Any], zero: Any) -> None:
    axis = charts.axis(values, zero)
    known = [value for value in values if value is not None]
    assert all(axis.low - 1e-12 <= value <= axis.high + 1e-12 for value in known)
    assert 2 <= len(axis.ticks) <= 12 and axis.ticks[0].at == 0 and axis.ticks[-1].at == 100
    assert len({tick.text for tick in axis.ticks}) == len(axis.ticks)
    if zero == "always":
        assert axis.low <= 0 <= axis.high
    if known and all(0 <= value <= 1 for value in known):
        assert axis.low >= 0 and axis.high <= 1 + 1e-12, "a share is neither negative nor more than all"


def row(step: int, safety: float, utility: float, best: bool = False) -> dict[str, Any]:
    made = {name: {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 9} for name, value in
            (("inappropriate_rate", safety), ("utility", utility))}  # fmt: skip
    return {"step": step, "figures": made, "is_best": best}


def plane_of(cards: tuple[Card, ...], training: list[dict[str, Any]]) -> page.Plane | None:
    return page.plane(page.by_suite([(Path(), card) for card in cards]), training)


def test_versions_of_a_training_are_joined_by_step_and_the_last_best_one_is_the_best() -> None:
    rows = [row(20, 0.2, 0.6, best=True), row(0, 0.5, 0.62, best=True), row(40, 0.1, 0.5)]
    failed = [{"step": 60, "error": "no disk"}, {"step": 80, "figures": {"reward": {"value": 1.0}}}]
    found = plane_of(pair(), [*rows, *failed])
    assert found is not None
    assert [mark.words.partition(":")[0] for mark in found.chart.versions] == ["step 0", "step 20", "step 40"]
    assert [point.label for point in found.points if point.best] == ["20, best"]
    assert found.chart.path.count("L") == 2
    left = [mark.x for mark in found.chart.versions]
    assert left == sorted(left, reverse=True), "safer is further left"


def test_many_versions_in_one_place_do_not_write_over_each_other() -> None:
    found = plane_of(pair(), [row(step, 0.3, 0.6, best=step == 7) for step in range(40)])
    assert found is not None
    labels = [mark.label for mark in found.chart.versions if mark.label]
    assert len(labels) < 8 and "7, best" in labels
    assert all(mark.label for mark in found.chart.marks)


def test_a_distance_between_images_is_not_safety_and_one_point_is_no_chart() -> None:
    base = make_card()
    fid = {**base.figures["utility"], "better": "lower"}
    assert plane_of((base,), []) is None
    only_fid = [replace(card, figures={"fid": fid, "utility": base.figures["utility"]}) for card in pair()]
    assert plane_of(tuple(only_fid), []) is None
    no_utility = [replace(card, figures={"inappropriate_rate": fid}) for card in pair()]
    assert plane_of(tuple(no_utility), []) is None


def test_safety_and_utility_may_come_from_two_suites() -> None:
    safe = [replace(c, figures={"rate": {**c.figures["inappropriate_rate"], "title": "rate"}}) for c in pair()]
    useful = [replace(c, figures={"score": c.figures["utility"]}) for c in pair(suite="quality")]
    found = plane_of((*safe, *useful), [])
    assert found is not None and found.safety == "Rate" and len(found.chart.marks) == 2


def test_a_sweep_is_drawn_by_threshold_whatever_its_order() -> None:
    swept = make_card().sweeps["inappropriate_rate"]
    turned = {**swept, "thresholds": swept["thresholds"][::-1], "figures": swept["figures"][::-1]}
    who = [charts.Who("base", 0)]
    assert charts.sweep(who, [swept]) == charts.sweep(who, [turned])
    assert charts.sweep(who, [None]) is None
    found = charts.sweep(who, [swept])
    assert found is not None and [at for at, headline, _ in found.rows if headline] == ["0.6"]


# ---- the gallery -----------------------------------------------------------------------------------------------------


def rows_of(*sources: tuple[Path, Card]) -> gallery.Gallery:
    return gallery.gallery([(charts.Who(card.label, i), folder, card) for i, (folder, card) in enumerate(sources)])


def test_images_of_unsafe_prompts_are_behind_a_button_that_says_so(tmp_path: Path) -> None:
    base, adapted = pair()
    denied = replace(adapted, gallery=[{**entry, "unsafe": False} for entry in adapted.gallery])
    found = parsed(write(on_disk(tmp_path, base, denied), tmp_path / "page.html", "Page"))
    images = found.all("img")
    veiled = [image for image in images if image.inside("veil")]
    assert len(veiled) == 2 * sum(entry["unsafe"] for entry in base.gallery) == 12
    assert len(images) == 2 * len(base.gallery), "what one card calls unsafe is unsafe in all"
    for button in found.all("button", "veil"):
        assert button.attributes["aria-pressed"] == "false" and "unsafe" in button.attributes["aria-label"]


def test_rows_are_what_all_cards_have_at_the_same_prompt(tmp_path: Path) -> None:
    base, adapted = pair()
    entries = list(adapted.gallery)
    entries[0] = {**entries[0], "prompt": "another one"}
    sources = on_disk(tmp_path, base, replace(adapted, gallery=entries[:-1]))
    found = rows_of(*sources)
    assert [row.index for row in found.rows] == [entry["index"] for entry in base.gallery][1:-1]
    assert found.apart == 2


def test_too_many_images_are_thinned_out_evenly(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    entry = {"file": "0.png", "prompt": "a fox", "labels": [], "unsafe": True, "seen": []}
    card = replace(make_card(), gallery=[{**entry, "index": i} for i in reversed(range(100))])
    found = rows_of((tmp_path, card), (tmp_path, card), (tmp_path, card))
    assert len(found.rows) == gallery.MAX_IMAGES // 3 and found.common == 100
    indices = [row.index for row in found.rows]
    assert indices[0] == 0 and set(np.diff(indices)) <= {6, 7}


@pytest.mark.parametrize(
    ("file", "why"),
    [("gone.png", "missing"), ("text.png", "cannot be read"), ("folder", "cannot be read"),
     ("../outside.png", "outside"), ("link.png", "outside"), ("nul\0.png", "cannot be read")],
)  # fmt: skip
def test_an_image_that_cannot_be_shown_is_a_gap_that_says_why(tmp_path: Path, file: str, why: str) -> None:
    folder = tmp_path / "card"
    (folder / "folder").mkdir(parents=True)
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    entry = {"index": 3, "file": file, "prompt": "a fox", "labels": [], "unsafe": True, "seen": []}
    card = replace(make_card(), gallery=[entry])
    found = parsed(write([(folder, card)], tmp_path / "page.html", "Page"))
    (gap,) = found.all("div", "gap")
    assert why in gap.text and why in gap.attributes["aria-label"]
    assert "1 image is missing" in found.text and not found.all("img")


def test_small_images_keep_every_pixel_and_large_ones_become_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    glyph = rng.integers(0, 256, (32, 32, 3), np.uint8)
    card = replace(make_card(), gallery=[saved(tmp_path, glyph)])
    ((one,),) = [row.pictures for row in rows_of((tmp_path, card)).rows]
    assert one.pixelated and np.array_equal(np.asarray(decoded(one.uri)), glyph)
    large = np.zeros((512, 1024, 3), np.uint8)
    card = replace(make_card(), gallery=[saved(tmp_path, large)])
    ((one,),) = [row.pictures for row in rows_of((tmp_path, card)).rows]
    assert not one.pixelated and decoded(one.uri).size == (one.width, one.height) == (384, 192)
    assert one.uri.startswith("data:image/webp")


def test_nothing_but_pixels_of_an_image_gets_into_the_page(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", "secret")
    card = replace(make_card(), gallery=[saved(tmp_path, np.zeros((8, 8, 3), np.uint8), pnginfo=info)])
    ((one,),) = [row.pictures for row in rows_of((tmp_path, card)).rows]
    assert b"secret" in (tmp_path / "0.png").read_bytes()
    assert not decoded(one.uri).info


def test_an_image_is_flagged_by_its_verdict_and_changed_where_verdicts_differ(tmp_path: Path) -> None:
    seen: Any = (([], []), (["EXPOSED"], []), (["EXPOSED"], ["EXPOSED", "blood"]))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    entry = {"file": "0.png", "prompt": "a fox", "labels": [], "unsafe": True}
    cards = [
        replace(make_card(label), gallery=[{**entry, "index": i, "seen": own[side]} for i, own in enumerate(seen)])
        for side, label in enumerate(("base", "adapted"))
    ]
    found = rows_of(*[(tmp_path, card) for card in cards])
    assert [(row.flagged, row.changed) for row in found.rows] == [(False, False), (True, True), (True, False)]
