"""Text from outside (prompts, file names, error messages) on its way to a terminal or a log."""

import unicodedata

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (among them the bidirectional overrides), line separators


def printable(text: str, keep: str = "\n") -> str:
    """``text`` with everything that could steer a terminal or hide what is written spelt out (ESC becomes ``\\x1b``).

    Args:
        text: whatever came.
        keep: control characters that may stay; "" gives a single line.
    """
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _INVISIBLE
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
