"""Tables of documents that a command writes: between a mark that names the command and an end mark."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_END = "<!-- end -->\n"


def write(document: Path, command: str, text: str) -> None:
    """Put `text` in the place of what `command` wrote into `document` before.

    Raises:
        ValueError: the document has no such place.
    """
    begin = f"<!-- {command} -->\n"
    before, mark, rest = document.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(_END)
    if not mark or not end:
        raise ValueError(f"{document} has no place for a table: a line {begin.strip()}, and below it {_END.strip()}")
    document.write_text(f"{before}{begin}\n{text}\n\n{_END}{after}", encoding="utf-8")
