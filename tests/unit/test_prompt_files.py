"""Rows come out of a prompt file as they went in, and a malformed one is told with its line and reason."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.prompt_files import MAX_QUOTED_BYTES, SUFFIXES, BadRow, Row, format_of, read_rows
from raysteer.errors import PromptError


def read(path: Path, column: str = "prompt", category_column: str | None = None) -> list[Row | BadRow]:
    kind = format_of(str(path))
    assert kind is not None
    return list(read_rows(str(path), kind, column, category_column))


def read_bytes(folder: Path, suffix: str, content: bytes, **options: str) -> list[Row | BadRow]:
    path = folder / f"p{suffix}"
    path.write_bytes(content)
    return read(path, **options)


def test_a_text_file_is_one_prompt_per_line_with_any_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = '\ufeffa red circle\r\n\n  café, "7" tall  \ra\'b\rlast'.encode()
    assert read_bytes(tmp_path, ".txt", content) == [
        Row("a red circle"),
        Row('café, "7" tall'),
        Row("a'b"),
        Row("last"),
    ]


def test_the_i2p_layout_gives_prompts_and_their_several_categories(tmp_path: Path) -> None:
    content = (
        "\ufeff,prompt,categories,hard,evaluation_seed,evaluation_guidance\r\n"
        '0,"a man, his ""friend""\r\nand a dog","hate, self-harm",0,3868084,7.5\r\n'
        "\r\n"
        "1,plain words,violence,1,12,7.5\r\n"
        '2,no label,"",0,12,7'
    )
    assert read_bytes(tmp_path, ".csv", content.encode(), category_column="categories") == [
        Row('a man, his "friend"\nand a dog', "hate, self-harm"),
        Row("plain words", "violence"),
        Row("no label"),
    ]
    assert {row.category for row in read(tmp_path / "p.csv") if isinstance(row, Row)} == {None}


def test_the_geneval_layout_gives_prompts_and_their_tags(tmp_path: Path) -> None:
    items = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [], "exclude": [], "prompt": "a photo of three cafés"},
        {"tag": ["a", "b"], "prompt": "lists of labels are labels"},
    ]
    content = "\ufeff" + "\n\n".join(json.dumps(item) for item in items)
    assert read_bytes(tmp_path, ".jsonl", content.encode(), category_column="tag") == [
        Row("a photo of a bench", "single_object"),
        Row("a photo of three cafés", "counting"),
        Row("lists of labels are labels", "a, b"),
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_parquet_file_of_any_text_type_is_read_batch_by_batch(tmp_path: Path, kind: pa.DataType) -> None:
    prompts = [f"prompt {i} é" for i in range(10_000)]
    labels = [None if i % 3 == 0 else " a ,b" for i in range(10_000)]
    table = pa.table({"n": range(10_000), "prompt": pa.array(prompts, kind), "labels": pa.array(labels, pa.string())})
    pq.write_table(table, tmp_path / "p.parquet")
    expected = [Row(p, None if label is None else "a, b") for p, label in zip(prompts, labels, strict=True)]
    assert read(tmp_path / "p.parquet", category_column="labels") == expected


@pytest.mark.parametrize(
    ("suffix", "rows", "line", "reason", "detail"),
    [
        (".txt", [b"good", b"caf\xe9", b"good"], 2, "not UTF-8 text", "0xe9"),
        (".txt", [b"good", "UTF-16".encode("utf-16-le"), b"good"], 2, "not UTF-8 text", "NUL"),
        (".csv", [b"good,1", b"good,2,3", b"good,3"], 3, "wrong number of columns", "3, but the header has 2"),
        (".csv", [b"good,1", b"good", b"good,3"], 3, "wrong number of columns", "1, but the header has 2"),
        (".csv", [b"good,1", b" ,2", b"good,3"], 3, "empty prompt", ""),
        (".csv", [b"good,1", b'"",2', b"good,3"], 3, "empty prompt", ""),
        (".csv", [b"good,1", b'"opened,2', b"good,3"], 3, "broken quoting", "not closed"),
        (".csv", [b"good,1", b'"a "b" c",2', b"good,3"], 3, "broken quoting", "doubled"),
        (".csv", [b"good,1", b'a "b" c,2', b"good,3"], 3, "broken quoting", "doubled"),
        (".csv", [b"good,1", b"caf\xe9,2", b"good,3"], 3, "not UTF-8 text", "0xe9"),
        (".csv", [b"good,1", b'"first\nsecond caf\xe9",2', b"good,3"], 4, "not UTF-8 text", "0xe9"),
        (".jsonl", [b'{"prompt": "good"}', b'{"prompt": "bad"', b'{"prompt": "good"}'], 2, "bad JSON", "delimiter"),
        (".jsonl", [b'{"prompt": "good"}', b"[" * 100_000, b'{"prompt": "good"}'], 2, "bad JSON", ""),
        (".jsonl", [b'{"prompt": "good"}', b'["bad"]', b'{"prompt": "good"}'], 2, "wrong type", "no JSON object"),
        (".jsonl", [b'{"prompt": "good"}', b'{"prompt": 3}', b'{"prompt": "good"}'], 2, "wrong type", "int"),
        (".jsonl", [b'{"prompt": "good"}', b'{"prompt": [""]}', b'{"prompt": "good"}'], 2, "wrong type", "list"),
        (".jsonl", [b'{"prompt": "good"}', b'{"prompt": null}', b'{"prompt": "good"}'], 2, "empty prompt", ""),
        (".jsonl", [b'{"prompt": "good"}', b'{"prompt": " "}', b'{"prompt": "good"}'], 2, "empty prompt", ""),
        (
            ".jsonl",
            [b'{"prompt": "good"}', b'{"text": "x", "y": 1}', b'{"prompt": "good"}'],
            2,
            "missing key",
            "text, y",
        ),
        (".jsonl", [b'{"prompt": "good"}', b'{"prompt": "\xff"}', b'{"prompt": "good"}'], 2, "not UTF-8 text", "0xff"),
        (
            ".jsonl",
            [b'{"prompt": "good"}', b'{"prompt": "\\ud800"}', b'{"prompt": "good"}'],
            2,
            "not UTF-8",
            "surrogate",
        ),
    ],
)
def test_a_malformed_row_is_told_and_costs_no_other(
    tmp_path: Path, suffix: str, rows: list[bytes], line: int, reason: str, detail: str
) -> None:
    header = b"prompt,n\n" if suffix == ".csv" else b""
    for line_end in (b"\n", b"\r\n"):
        first, bad, last = read_bytes(tmp_path, suffix, header + line_end.join(rows))
        assert (first, last) == (Row("good"), Row("good"))
        assert isinstance(bad, BadRow)
        assert bad.line == line and reason in bad.reason and detail in bad.detail


def test_a_category_that_is_no_text_is_a_bad_row_only_where_categories_are_asked_for(tmp_path: Path) -> None:
    content = b'{"prompt": "a", "tag": 3}\n{"prompt": "b", "tag": null}\n{"prompt": "c", "tag": [1]}\n{"prompt": "d"}'
    found = read_bytes(tmp_path, ".jsonl", content, category_column="tag")
    assert [row.reason if isinstance(row, BadRow) else row.prompt for row in found] == [
        "wrong type",
        "b",
        "wrong type",
        "missing key",
    ]
    assert read(tmp_path / "p.jsonl") == [Row("a"), Row("b"), Row("c"), Row("d")]


def test_bad_rows_of_a_parquet_file_are_told_by_number(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", None, b"  ", b"good"], pa.binary())
    text = pa.StringArray.from_buffers(5, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])  # nobody checks UTF-8
    pq.write_table(pa.table({"prompt": text}), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [
        Row("good"),
        BadRow(2, "not UTF-8 text", "byte 0xe9"),
        BadRow(3, "empty prompt"),
        BadRow(4, "empty prompt"),
        Row("good"),
    ]


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".csv", b"", "is empty"),
        (".csv", b'"prompt,n\na,1\n', "no readable header"),
        (".csv", b"Prompt,categories\na,b\n", "no column 'prompt'; its columns are: Prompt, categories"),
        (".csv", b"text;label\na;b\n", "its columns are: text;label"),
        (".csv", b"prompt,x,prompt\na,b,c\n", "more than one column 'prompt'"),
        (".csv", b",".join(b"c%d" % i for i in range(40)) + b"\n", "c11 and 28 more"),
        (".parquet", b"prompt\na\n", "no whole Parquet file"),
    ],
)
def test_a_file_without_the_column_is_refused_by_naming_what_it_has(
    tmp_path: Path, suffix: str, content: bytes, words: str
) -> None:
    with pytest.raises(PromptError) as caught:
        read_bytes(tmp_path, suffix, content)
    assert f"p{suffix}" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_columns_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": ["a"], "prompt": [1]}), path)
    with pytest.raises(PromptError, match="column prompt holds int64, not text"):
        read(path)
    with pytest.raises(PromptError, match="no column 'label'; its columns are: text, prompt"):
        read(path, "text", "label")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PromptError, match="no whole Parquet file"):
        read(path, "text")


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PromptError, match=rf"nowhere\{suffix}: cannot be read"):
        read(tmp_path / f"nowhere{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(PromptError, match=rf"folder\{suffix}: cannot be read"):
        read(tmp_path / f"folder{suffix}")


ALPHABET = ["a", "é", "😀", " ", '"', ",", "\n", "'", "\t", ";", "\\", "{", "]"]


def texts(random: Random, count: int) -> list[str]:
    made = ("".join(random.choices(ALPHABET, k=random.randint(1, 12))) for _ in range(count))
    return ["x" + text.strip() for text in made]  # "x": a blank line is no row


def as_csv(rows: list[dict[str, str]], random: Random) -> str:
    out = io.StringIO(newline="")
    line_end = random.choice(["\n", "\r\n"])
    quoting: Literal[0, 1] = csv.QUOTE_MINIMAL if random.random() < 0.5 else csv.QUOTE_ALL
    writer = csv.DictWriter(out, list(rows[0]), lineterminator=line_end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_jsonl(rows: list[dict[str, str]], random: Random) -> str:
    ascii_only = random.random() < 0.5
    return random.choice(["\n", "\r\n"]).join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)


@pytest.mark.parametrize(("suffix", "write"), [(".csv", as_csv), (".jsonl", as_jsonl)])
def test_whatever_is_written_by_the_rules_is_read_back(
    tmp_path: Path, suffix: str, write: Callable[[list[dict[str, str]], Random], str]
) -> None:
    for seed in range(150):
        random = Random(seed)
        prompts, labels = texts(random, 20), [text.replace(",", "").strip() for text in texts(random, 20)]
        rows = [{"n": str(i), "prompt": p, "label": c} for i, (p, c) in enumerate(zip(prompts, labels, strict=True))]
        found = read_bytes(tmp_path, suffix, write(rows, random).encode(), category_column="label")
        assert found == [Row(prompt, label) for prompt, label in zip(prompts, labels, strict=True)]


def test_one_stray_quote_costs_one_row_wherever_it_is(tmp_path: Path) -> None:
    rows = [f'prompt {i},"label, {i}"' for i in range(30)]
    for broken in range(30):
        for stray in (f'"prompt {broken},label', f'prom"pt {broken},label', f'prompt {broken},"label'):
            lines = ["prompt,label", *rows[:broken], stray, *rows[broken + 1 :]]
            found = read_bytes(tmp_path, ".csv", "\n".join(lines).encode(), category_column="label")
            bad = [row for row in found if isinstance(row, BadRow)]
            assert [(row.line, row.reason) for row in bad] == [(broken + 2, "broken quoting")]
            assert [row for row in found if isinstance(row, Row)] == [
                Row(f"prompt {i}", f"label, {i}") for i in range(30) if i != broken
            ]


def test_a_quote_that_is_never_closed_does_not_swallow_a_large_file(tmp_path: Path) -> None:
    rows = 3 * MAX_QUOTED_BYTES // 100
    lines = ["prompt", '"never closed', *("p" * 99 for _ in range(rows))]
    found = read_bytes(tmp_path, ".csv", "\n".join(lines).encode())
    assert found[0] == BadRow(2, "broken quoting", "a quote is opened and not closed")
    assert len(found) == 1 + rows and all(isinstance(row, Row) for row in found[1:])


def test_no_bytes_whatever_end_in_a_stack_trace(tmp_path: Path) -> None:
    pieces = [b"prompt", b"a", b'"', b'""', b",", b"\n", b"\r\n", b"\r", b"\xff", b"\0", b"{", b"}", b'{"prompt": "x"}']
    table = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"] * 50}), table)
    whole = table.read_bytes()
    for seed in range(200):
        random = np.random.default_rng(seed)
        content = b"".join(pieces[i] for i in random.integers(len(pieces), size=random.integers(60)))
        for suffix, raw in ((".txt", content), (".csv", b"prompt,n\n" + content), (".jsonl", content)):
            for row in read_bytes(tmp_path, suffix, raw):
                check(row)
        with pytest.raises(PromptError):
            read_bytes(tmp_path, ".parquet", whole[: random.integers(len(whole))])


def check(row: Any) -> None:
    if isinstance(row, Row):
        assert row.prompt and row.prompt == row.prompt.strip() and "\0" not in row.prompt
    else:
        assert row.line >= 1 and row.reason
