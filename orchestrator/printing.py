"""Text from files, as a terminal may get it."""


def printable(text: str, kept: str = "\n\t") -> str:
    r"""Return the text with its control characters written out, but for those that are kept.

    They would move the cursor, change colours, or have the terminal type an answer.

    >>> print(printable("\x1b[31mred"))
    \x1b[31mred
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
