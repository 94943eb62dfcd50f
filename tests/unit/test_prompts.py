"""A run's prompts: sources by class and weight, held compactly; what is wrong with them is told before a run starts."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import load_recipe
from cluster.plan import resolve
from cluster.prompts import CHUNK_ROWS, PromptsConfig, PromptSet, load_prompts, summarise
from cluster.tickets import TicketSource
from raysteer.errors import ConfigError, PromptError
from tests.conftest import REMOVE, RecipeFactory


def configure(folder: Path, *sources: dict[str, Any], **others: Any) -> PromptsConfig:
    """A config of sources whose files get `content`, if they have one."""
    for source in sources:
        source["path"] = str(folder / source["path"])
        if "content" in source:
            Path(source["path"]).write_text(source.pop("content"), encoding="utf-8")
    return PromptsConfig.model_validate({"sources": sources, **others})


def texts(prompts: PromptSet) -> dict[str, list[str]]:
    return {source.name: [source.prompt(i) for i in range(len(source))] for source in prompts.sources}


def short_form(folder: Path, safe: str = "a\nb\nc\n", unsafe: str = "x\ny\n", **others: Any) -> PromptsConfig:
    (folder / "safe.txt").write_text(safe)
    (folder / "unsafe.txt").write_text(unsafe)
    return PromptsConfig(safe=str(folder / "safe.txt"), unsafe=str(folder / "unsafe.txt"), **others)


def test_the_short_form_is_two_sources_named_by_their_class(tmp_path: Path) -> None:
    loaded = load_prompts(short_form(tmp_path))
    assert [(s.name, s.prompt_class, s.weight) for s in loaded.sources] == [
        ("safe", "safe", 1.0),
        ("unsafe", "unsafe", 1.0),
    ]
    assert texts(loaded) == {"safe": ["a", "b", "c"], "unsafe": ["x", "y"]}
    assert loaded.examples(2) == ("a", "b", "x", "y")


def test_sources_of_all_formats_keep_class_category_and_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["cat", "dog", "cow"], "kind": ["pet", "pet", None]}), tmp_path / "c.parquet")
    loaded = load_prompts(
        configure(
            tmp_path,
            {"path": "i2p.csv", "class": "unsafe", "category_column": "categories", "content": CSV},
            {"path": "mine.txt", "class": "unsafe", "category": "hate", "content": "x\n"},
            {"path": "g.jsonl", "class": "utility", "category_column": "tag", "content": '{"tag":"t","prompt":"p"}'},
            {"path": "c.parquet", "class": "safe", "column": "caption", "category_column": "kind", "limit": 2},
            {"path": "data", "format": "txt", "class": "safe", "content": "plain\n"},
        )
    )
    assert texts(loaded) == {
        "i2p": ["one, two", "three"],
        "mine": ["x"],
        "g": ["p"],
        "c": ["cat", "dog"],
        "data": ["plain"],
    }
    categories = [[source.category_of(i) for i in range(len(source))] for source in loaded.sources]
    assert categories == [["hate, violence", None], ["hate"], ["t"], ["pet", "pet"], [None]]
    assert loaded.examples(1) == ("cat", "one, two", "p")


CSV = 'prompt,categories,evaluation_seed\n"one, two","hate,violence",3\nthree,,4\n'


def test_two_files_of_one_name_can_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [{"path": name, "class": "safe", "content": "a\n"} for name in ("p.txt", "b/p.txt", "p-2.txt")]
    assert list(texts(load_prompts(configure(tmp_path, *files, unsafe_fraction=0)))) == ["p", "p-2", "p-2-2"]


def test_a_limit_takes_the_first_prompts_and_looks_no_further(tmp_path: Path) -> None:
    source = {"path": "p.csv", "class": "safe", "limit": 2, "content": "prompt,n\na,1\nb,2\nc,3,broken\n"}
    assert texts(load_prompts(configure(tmp_path, source, unsafe_fraction=0))) == {"p": ["a", "b"]}


def test_a_malformed_row_is_refused_by_file_line_and_reason_or_skipped_and_counted(tmp_path: Path) -> None:
    source = {
        "path": "p.csv",
        "class": "unsafe",
        "content": 'prompt,categories\na,x\nb\n ,x\nc,x,y\nd,"x\ne,x\n',
    }
    others: dict[str, Any] = {"path": "s.txt", "class": "safe", "content": "s\n"}
    with pytest.raises(PromptError) as caught:
        load_prompts(configure(tmp_path, dict(source), dict(others)))
    assert str(caught.value) == (
        f"{tmp_path}/p.csv:3: wrong number of columns (1, but the header has 2); "
        "correct the row, or set prompts.bad_rows to skip"
    )
    skipping = configure(tmp_path, source, others, bad_rows="skip")
    assert texts(load_prompts(skipping)) == {"p": ["a", "e"], "s": ["s"]}
    counted, clean = summarise(skipping)
    assert counted.skipped == {"wrong number of columns": 2, "empty prompt": 1, "broken quoting": 1}
    assert (counted.prompts, clean.prompts, clean.skipped) == (2, 1, {})
    assert str(counted) == (
        "p (unsafe): 2 prompts, 50 % of groups; "
        "4 rows skipped (2 wrong number of columns, 1 empty prompt, 1 broken quoting)"
    )


def test_an_empty_class_is_refused_unless_its_share_is_zero(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"holds no unsafe prompt.*unsafe_fraction to 0"):
        load_prompts(short_form(tmp_path, unsafe="\n"))
    with pytest.raises(PromptError, match=r"holds no safe prompt.*unsafe_fraction to 1"):
        load_prompts(short_form(tmp_path, safe=""))
    assert list(texts(load_prompts(short_form(tmp_path, unsafe="\n", unsafe_fraction=0)))) == ["safe"]


def test_a_file_of_nothing_but_bad_rows_is_refused_even_when_they_are_skipped(tmp_path: Path) -> None:
    source = {"path": "p.jsonl", "class": "safe", "content": "{\n{}\n"}
    with pytest.raises(PromptError, match=r"holds no safe prompt \(2 rows skipped\).*remove the source"):
        load_prompts(configure(tmp_path, source, unsafe_fraction=0, bad_rows="skip"))


def test_shares_are_told_per_source_and_sources_that_are_not_drawn_from_are_not_read(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"path": "a.txt", "class": "safe", "weight": 3, "content": "a\n"},
        {"path": "u.txt", "class": "unsafe", "content": "u\n"},
        {"path": "g.txt", "class": "utility", "content": "g\n"},
    ]
    shares = [
        source.share for source in summarise(configure(tmp_path, *(dict(s) for s in sources), unsafe_fraction=0.2))
    ]
    assert shares == pytest.approx([0.6, 0.2, 0.2])
    (tmp_path / "u.txt").unlink()
    without = configure(tmp_path, *({"path": s["path"], "class": s["class"]} for s in sources), unsafe_fraction=0)
    assert [str(source) for source in summarise(without)] == [
        "a (safe): 1 prompts, 50 % of groups",
        "u (unsafe): not drawn from",
        "g (utility): 1 prompts, 50 % of groups",
    ]


def test_what_was_counted_is_forgotten_when_a_file_changes(tmp_path: Path) -> None:
    cfg = short_form(tmp_path)
    assert [source.prompts for source in summarise(cfg)] == [3, 2]
    Path(cfg.safe or "").write_text("a\n\xff?\n", encoding="latin-1")
    with pytest.raises(PromptError, match=r"safe\.txt:2.*UTF-8"):
        summarise(cfg)


def test_the_short_form_is_short_for_its_sources_and_a_second_source_has_an_order_of_its_own(tmp_path: Path) -> None:
    lines = "".join(f"prompt {i}\n" for i in range(20))
    short = short_form(tmp_path, safe=lines, unsafe=lines)
    long = [{"path": f"{name}.txt", "class": name} for name in ("unsafe", "safe")]
    second: dict[str, Any] = {"path": "more.txt", "class": "safe", "content": lines}

    def drawn(cfg: PromptsConfig) -> list[tuple[str, str]]:
        source = TicketSource(5, load_prompts(cfg), 0.5, group_size=2, groups_per_step=2)
        return [(ticket.source, ticket.prompt) for ticket in map(source.ticket, range(80))]

    assert drawn(short) == drawn(configure(tmp_path, *(dict(one) for one in long)))
    tickets = drawn(configure(tmp_path, *long, second))
    safe, more = ([prompt for source, prompt in tickets if source == name] for name in ("safe", "more"))
    assert len(safe) == len(more) == 20 and set(safe) == set(more) and safe != more


def test_a_prompt_costs_its_bytes_and_eight_more(tmp_path: Path) -> None:
    count = 3 * CHUNK_ROWS + 5
    prompts = [f"a prompt é {i}" for i in range(count)]
    (tmp_path / "p.csv").write_text("prompt,label\n" + "".join(f"{p},l{i % 3}\n" for i, p in enumerate(prompts)))
    source = {"path": "p.csv", "class": "safe", "category_column": "label"}
    (loaded,) = load_prompts(configure(tmp_path, source, unsafe_fraction=0)).sources
    assert loaded.prompts.nbytes <= sum(len(prompt.encode()) for prompt in prompts) + 8 * (count + 10)
    assert loaded.label_codes is not None and loaded.label_codes.nbytes == 4 * count
    for index in (0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, count - 1):
        assert (loaded.prompt(index), loaded.category_of(index)) == (prompts[index], f"l{index % 3}")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"prompts.sources": [{"path": "a.txt", "class": "safe"}]}, "prompts.safe", "does not go with sources"),
        ({"prompts.safe": REMOVE}, "prompts", "both safe and unsafe"),
        ({"prompts.safe": "prompts.dat"}, "prompts.safe", ".txt, .csv, .jsonl, .parquet"),
        ({"prompts.bad_rows": "ignore"}, "prompts.bad_rows", "'refuse' or 'skip'"),
        ({"prompts": {"sources": []}}, "prompts.sources", "at least 1"),
        ({"prompts": {"sources": [{"path": "a.txt"}]}}, "prompts.sources.0.class", "add it"),
        ({"prompts": {"sources": [{"path": "a.txt", "class": "bad"}]}}, "prompts.sources.0.class", "'utility'"),
        ({"prompts": {"sources": [{"path": "a.tsv", "class": "safe"}]}}, "prompts.sources.0.path", "format: txt"),
        (
            {"prompts": {"sources": [{"path": "a.txt", "class": "safe", "wieght": 2}]}},
            "prompts.sources.0.wieght",
            "did you mean prompts.sources.weight?",
        ),
        (
            {"prompts": {"sources": [{"path": "a.txt", "class": "safe", "weight": 0}]}},
            "prompts.sources.0.weight",
            "greater than 0",
        ),
        (
            {"prompts": {"sources": [{"path": "a.txt", "class": "safe", "column": "text"}]}},
            "prompts.sources.0.column",
            "one prompt per line",
        ),
        (
            {"prompts": {"sources": [{"path": "a.csv", "class": "safe", "category": "x", "category_column": "y"}]}},
            "prompts.sources.0.category",
            "one of them",
        ),
        ({"prompts": {"sources": [{"path": "a.txt", "class": "safe"}]}}, "prompts.sources", "class: unsafe"),
        (
            {"prompts": {"sources": [{"path": "a.txt", "class": "unsafe"}]}},
            "prompts.sources",
            "class: safe or utility",
        ),
    ],
)
def test_impossible_sources_are_refused_by_key(
    tiny_recipe: RecipeFactory, changes: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny_recipe(changes))
    assert caught.value.key == key
    assert words in str(caught.value)


def sources_recipe(tiny_recipe: RecipeFactory, folder: Path) -> Path:
    (folder / "i2p.csv").write_text(CSV, encoding="utf-8")
    sources = [
        {"path": "i2p.csv", "class": "unsafe", "category_column": "categories"},
        {"path": "safe.txt", "class": "safe", "weight": 2},
        {"path": str(folder / "unsafe.txt"), "class": "utility", "limit": 1},
    ]
    return tiny_recipe({"prompts": {"sources": sources}})


def test_a_recipe_with_sources_reads_back_as_itself_and_follows_contents(
    tiny_recipe: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sources_recipe(tiny_recipe, tmp_path)
    recipe = load_recipe(file)
    assert recipe.prompts.sources is not None and recipe.prompts.sources[0].path == str(tmp_path / "i2p.csv")
    monkeypatch.chdir(tmp_path)
    assert "class: unsafe" in recipe.to_yaml() and "path: i2p.csv" in recipe.to_yaml()
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml")
    before = recipe.fingerprint()
    assert again == recipe and again.fingerprint() == before
    (tmp_path / "i2p.csv").write_text(CSV + "four,hate,1\n", encoding="utf-8")
    assert recipe.fingerprint() != before


def test_the_fingerprint_notices_one_byte_in_the_middle_of_a_very_large_file(tmp_path: Path) -> None:
    path, size = tmp_path / "p.txt", 66 * 2**20
    with path.open("wb") as file:
        file.truncate(size)
    cfg = PromptsConfig.model_validate({"sources": [{"path": str(path), "class": "safe"}], "unsafe_fraction": 0})
    before = cfg.identity()
    with path.open("rb+") as file:
        file.seek(size // 2)
        file.write(b"x")
    os.utime(path, ns=(0, 1))
    assert cfg.identity() != before


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 3},
        {"limit": 1},
        {"class": "utility"},
        {"category": "x"},
        {"column": "categories", "format": "csv"},
    ],
)
def test_what_decides_the_tickets_is_in_the_identity(tmp_path: Path, change: dict[str, Any]) -> None:
    source = {"path": "p.csv", "class": "safe", "content": CSV}
    plain = configure(tmp_path, dict(source), unsafe_fraction=0).identity()
    assert configure(tmp_path, source | change, unsafe_fraction=0).identity() != plain
    assert configure(tmp_path, dict(source), unsafe_fraction=0, bad_rows="skip").identity() != plain
    assert configure(tmp_path, source | {"format": "csv"}, unsafe_fraction=0).identity() == plain


def test_the_plan_tells_prompts_per_source_and_survives_files_that_are_elsewhere(
    tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    file = sources_recipe(tiny_recipe, tmp_path)
    lines = resolve(load_recipe(file)).render().splitlines()
    assert "prompts        i2p (unsafe): 2 prompts, 50 % of groups" in lines
    assert "               safe (safe): 3 prompts, 33.3 % of groups" in lines
    assert "               unsafe (utility): 1 prompts, 16.7 % of groups" in lines
    assert "1 safe or utility)" in "\n".join(lines)
    (tmp_path / "i2p.csv").unlink()
    assert "cannot be read here" in resolve(load_recipe(file)).render()
