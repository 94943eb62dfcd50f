"""Text from outside (prompts, file names, error messages) on its way to a terminal or a log."""


def one_line(text: str) -> str:
    """``text`` with everything that breaks a line, steers a terminal or hides what is written spelt out: line breaks as
    ``\\n``, ESC as ``\\x1b``, bidirectional overrides and other unprintable characters alike.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
