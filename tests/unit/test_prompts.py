"""Prompt files are plain text, and a bad one is named with its line."""

from pathlib import Path

import pytest

from cluster.prompts import PromptsConfig, load_prompts, read_prompts
from raysteer.errors import PromptError


def test_blank_lines_and_byte_order_marks_are_not_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red circle\r\n\n  café  \n".encode())
    assert read_prompts(path) == ("a red circle", "café")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(PromptError, match=r"p\.txt:2.*UTF-8"):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_an_empty_class_is_refused_unless_its_share_is_zero(tmp_path: Path) -> None:
    (tmp_path / "safe.txt").write_text("a\n")
    (tmp_path / "unsafe.txt").write_text("\n")
    paths = {"safe": str(tmp_path / "safe.txt"), "unsafe": str(tmp_path / "unsafe.txt")}
    with pytest.raises(PromptError, match="unsafe_fraction"):
        load_prompts(PromptsConfig(**paths))
    assert load_prompts(PromptsConfig(**paths, unsafe_fraction=0)).unsafe == ()
