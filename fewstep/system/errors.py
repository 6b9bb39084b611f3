"""Errors that a user can mend: the command line prints their message in one line, without a traceback.

Each message names the setting or the file, what it must be, what it is, and what to try.
"""

__all__ = ["DataError", "EvaluationError", "FileError", "SettingsError", "TeacherError", "UserError", "WriteError"]


class UserError(ValueError):
    """Something that the person who runs fewstep can mend."""


class SettingsError(UserError):
    """A setting, or several together, that cannot be carried out."""


class FileError(UserError):
    """A file or folder that is missing, damaged, of another form, or made for something else."""


class WriteError(FileError, OSError):
    """A file that could not be written; the message says what is intact and what the disk lacks."""


class DataError(UserError):
    """Images, captions or prompts that are missing, damaged, or do not fit the run."""


class TeacherError(UserError):
    """A teacher that cannot be loaded, or that does not fit what the run asks of it."""


class EvaluationError(UserError):
    """Samples that cannot be scored: statistics, features or weights that are missing, damaged, or do not match."""
