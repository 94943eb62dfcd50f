"""A metric card is read as it was written or refused by name, and its Markdown says what it says and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from evaluation.card import CARD, FORMAT, MARKDOWN, Card, read_card
from evaluation.card_markdown import cell, flat, interval, markdown, markdown_table, number, plain
from raysteer.errors import CardError
from raysteer.text import one_line
from tests.cards import make_card, write_card
from tests.unit.test_hostile import HOSTILE

MARKUP = {
    **HOSTILE,
    "pipes": "a | b || c \\| d \\\\| e |",
    "code": "`a` ``b | c`` ```",
    "lines": "first\nsecond\r\n\r\n# heading\n- item",
    "table": "x |\n| --- |\n| y",
    "link": "[here](http://evil.example) ![i](x.png) <http://evil.example> https://evil.example www.evil.example",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ # f",
    "entity": "&lt;b&gt; &#124; &amp;",
    "mathematics": "$x$ $$y$$ \\(z\\)",
}


def shown(text: str) -> tuple[list[list[str]], set[str]]:
    """Texts of the cells of every row of all tables, and the kinds of inline tokens, as a Markdown reader sees them."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    rows: list[list[str]] = []
    kinds: set[str] = set()
    for token in parser.parse(text):
        if token.type == "tr_open":
            rows.append([])
        if token.type == "html_block":
            kinds.add(token.type)
        for child in token.children or []:
            kinds.add(child.type)
        if token.type == "inline" and token.level >= 4 and rows:
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows, kinds


@pytest.mark.parametrize(
    "card",
    [
        make_card(),
        make_card("adapted", seed=1, n=1),
        make_card(suite="quality", gallery=[], groups={}, sweeps={}, counts={}),
        make_card(label="größer | `x`\n", model={"path": "m", "sha256": None, "adapter": None}),
    ],
    ids=["plain", "one prompt", "figures alone", "odd"],
)
def test_a_card_is_read_as_it_was_written(card: Card, tmp_path: Path) -> None:
    file = write_card(tmp_path / "new" / "folder", card)
    assert read_card(file) == read_card(file.parent) == card
    assert json.loads(file.read_text()) == {"format": FORMAT, **vars(card)}
    assert {entry.name for entry in file.parent.iterdir()} - {"images"} == {CARD, MARKDOWN}  # nothing left beside them
    assert all((file.parent / str(entry["file"])).is_file() for entry in card.gallery)


def test_a_card_replaces_an_older_one(tmp_path: Path) -> None:
    write_card(tmp_path, make_card("old"))
    write_card(tmp_path, make_card("new"))
    assert read_card(tmp_path).label == "new"
    assert "new" in (tmp_path / MARKDOWN).read_text().splitlines()[0]


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    write_card(tmp_path, make_card("old"))
    broken = make_card("new")
    broken.figures["utility"]["value"] = math.nan  # type: ignore[index]
    with pytest.raises(ValueError, match=r"figures\.utility\.value"):
        write_card(tmp_path, broken)
    assert read_card(tmp_path).label == "old"
    assert "old" in (tmp_path / MARKDOWN).read_text().splitlines()[0]


def test_a_figure_may_have_no_interval_and_json_has_no_nan(tmp_path: Path) -> None:
    card = make_card(suite="quality")
    bare = {**card.figures["fid"], "low": math.nan, "high": math.inf, "standard_error": None}
    file = write_card(tmp_path, replace(card, figures={**card.figures, "fid": bare}))
    assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()
    assert read_card(file).figures["fid"]["low"] is None


Damage = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda card: card.pop("figures"), "figures is missing"),
        (lambda card: card.pop("protocol"), "protocol is missing"),
        (lambda card: card["figures"]["utility"].pop("better"), "figures.utility.better is missing"),
        (lambda card: card["figures"]["utility"].update(better="bigger"), "figures.utility.better 'bigger'"),
        (lambda card: card["figures"]["utility"].update(value="0.5"), "figures.utility.value '0.5'"),
        (lambda card: card["figures"]["utility"].update(value=float("nan")), "figures.utility.value nan"),
        (lambda card: card.update(figures={}), "figures {}"),
        (lambda card: card.update(label=""), "label ''"),
        (lambda card: card.update(verdict="safe"), "verdict is no field of a card"),
        (lambda card: card["samples"]["utility"]["strata"].pop(), "samples.utility"),
        (lambda card: card["samples"]["utility"]["values"].append("x"), "samples.utility.values.48"),
        (lambda card: card["sweeps"]["inappropriate_rate"]["thresholds"].pop(), "5 thresholds, but 6 figures"),
        (lambda card: card["gallery"][0].update(file="../../secret.png"), "gallery.0.file '../../secret.png'"),
        (lambda card: card["gallery"][0].update(file="/etc/passwd"), "gallery.0.file"),
        (lambda card: card["model"].update(adapter={"source": "runs/x"}), "model.adapter.checksum is missing"),
        (lambda card: card.update(format=2), "format 2"),
        (lambda card: card.update(format="1"), "format '1'"),
        (lambda card: card.update(format=True), "format True"),
        (lambda card: card.pop("format"), "no 'format'"),
    ],
)
def test_a_damaged_card_is_refused_with_file_field_and_remedy(damage: Damage, named: str, tmp_path: Path) -> None:
    file = write_card(tmp_path, make_card())
    found = json.loads(file.read_text())
    damage(found)
    file.write_text(json.dumps(found))
    with pytest.raises(CardError) as refused:
        read_card(tmp_path)
    assert refused.value.subject == str(file)
    assert named in refused.value.problem
    assert "evaluate again" in refused.value.remedy or "card.json" in refused.value.remedy


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no such card"),
        (b"", "not JSON"),
        (b'{"format": 1, "figures": {', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a metric card"),
        (b"null", "not a metric card"),
        (b'{"loss": 1.0}', "not a metric card"),
    ],
)
def test_what_is_no_card_is_named(content: bytes | None, problem: str, tmp_path: Path) -> None:
    file = tmp_path / CARD
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CardError) as refused:
        read_card(file)
    assert str(file) in str(refused.value) and problem in refused.value.problem
    assert len(str(refused.value).splitlines()) == 1


def test_a_folder_in_place_of_the_file_is_an_error_and_no_stack_trace(tmp_path: Path) -> None:
    (tmp_path / CARD).mkdir()
    with pytest.raises(CardError, match=r"no such card|cannot be read"):
        read_card(tmp_path)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def test_the_markdown_holds_every_figure_threshold_group_and_fact() -> None:
    card = make_card("adapted", suite="quality")
    rows, _ = shown(markdown(card))
    for name, figure in card.figures.items():
        row = next(row for row in rows if name in row)
        for said in (number(figure["value"]), interval(figure), number(figure["standard_error"]), str(figure["n"])):
            assert said in row
        assert row[0].startswith(figure["title"])
    for groups in card.groups.values():
        for label, figure in groups.items():
            assert [label, number(figure["value"]), interval(figure), str(figure["n"])] in rows
    sweep = card.sweeps["inappropriate_rate"]
    for at, figure in zip(sweep["thresholds"], sweep["figures"], strict=True):
        told = f"{at} (headline)" if at == sweep["at"] else str(at)
        assert [told, number(figure["value"]), interval(figure), str(figure["n"])] in rows
    for block in (card.protocol, card.model, card.counts, card.software):
        for path, value in flat(block).items():
            assert [path, plain(value)] in rows
    for said in ("prompt_set_sha256", "safety_checker", "detectors.nudenet.threshold", "adapter.checksum"):
        assert any(row[0] == said for row in rows)


@pytest.mark.parametrize("text", MARKUP.values(), ids=MARKUP)
def test_in_a_table_every_text_stands_for_itself(text: str) -> None:
    rows, kinds = shown(markdown_table(["name", "value"], [[text, "1"], ["after", text]]))
    expected = one_line(text.strip())
    expected = expected if len(expected) <= 200 else expected[:199] + "…"
    assert rows == [["name", "value"], [expected, "1"], ["after", expected]]
    assert kinds <= {"text", "text_special"}


@pytest.mark.parametrize("text", MARKUP.values(), ids=MARKUP)
def test_a_card_of_hostile_texts_has_the_tables_of_an_honest_one(text: str) -> None:
    def card(word: str) -> Card:
        honest = make_card()
        figures = {name: {**figure, "title": f"{word}{name}"} for name, figure in honest.figures.items()}
        return replace(
            honest,
            label=word,
            suite=word,
            created=word,
            figures=figures,
            groups={word: {word: honest.figures["utility"]}},
            counts={word: 3},
            software={word: word},
            protocol={"prompts": [word, word], "detector": {word: word}},
        )

    hostile_rows, kinds = shown(markdown(card(text)))
    honest_rows, _ = shown(markdown(card("word")))
    assert [len(row) for row in hostile_rows] == [len(row) for row in honest_rows]
    assert kinds <= {"text", "text_special"}


def test_bare_addresses_do_not_become_links_where_readers_link_them() -> None:
    for address in ("https://evil.example", "HTTP://evil.example", "www.evil.example"):
        assert address not in cell(f"see {address}!")


def test_a_long_list_is_told_by_its_first_members_and_its_length() -> None:
    assert plain(list(range(1000))) == "0, 1, 2, … (1000 values)"
    assert plain(["a", "b"]) == "a, b" and plain(None) == "none" and plain(True) == "true" and plain(0.45) == "0.45"


def test_nested_facts_get_dotted_paths_and_nothing_is_lost() -> None:
    nested = {"a": {"b": {"c": 1}, "d": []}, "e": {}, "f": None}
    assert flat(nested) == {"a.b.c": 1, "a.d": [], "e": {}, "f": None}
    assert flat({}) == {}
