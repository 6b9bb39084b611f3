"""Output of commands, for comparison."""

import re


def unboxed(text: str) -> str:
    """Text of boxes as one line: without frames, line breaks and runs of spaces."""
    return " ".join(re.sub("[│╭╮╰╯─]|-{4,}", " ", text).split())
