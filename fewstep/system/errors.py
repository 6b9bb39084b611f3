"""Errors that a user can fix: the command line prints their message in one line, without a traceback.

Each message names the setting or file, the requirement, the actual value, and a remedy.
"""

__all__ = ["DataError", "EvaluationError", "FileError", "SettingsError", "TeacherError", "UserError", "WriteError"]


MESSAGE = 4_000  # characters of a whole message


def printable(text: str) -> str:
    """Replace what a terminal would obey or not show, such as ANSI escapes, by its escape; line ends stay."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


class UserError(ValueError):
    """An error that the user can fix. Its text is printable and of bounded length, whatever a foreign file puts into it."""

    def __str__(self) -> str:
        said = printable(super().__str__())
        return said if len(said) <= MESSAGE else f"{said[:MESSAGE]}... ({len(said) - MESSAGE:,} characters left out)"


class SettingsError(UserError):
    """An invalid setting, or settings that contradict each other."""


class FileError(UserError):
    """A file or folder that is missing, damaged, in another format, or made for something else."""


class WriteError(FileError, OSError):
    """A file that could not be written; the message states what is intact and what space is missing."""


class DataError(UserError):
    """Images, captions or prompts that are missing, damaged, or do not fit the run."""


class TeacherError(UserError):
    """A teacher that cannot be loaded, or that does not support the run's settings."""


class EvaluationError(UserError):
    """Samples that cannot be scored: statistics, features or weights that are missing, damaged, or do not match."""
