"""Code from outside the package that adds methods, teachers, networks and data sets: Python files, modules, plugins.

Code comes from three sources: the `imports` of a run file, the option `--imports`, and installed packages with an entry
point in the group `fewstep.plugins`. A model's file names the code that it was made with. fewstep imports that code only if
the same code was imported on this machine before, from one of the first two sources. Knows nothing of diffusion.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fewstep.system.console import note
from fewstep.system.errors import SettingsError, UserError
from fewstep.system.files import atomic_write, cache_folder

__all__ = [
    "Import",
    "changed_imports",
    "classes",
    "follow_mentions",
    "forget",
    "keep_copies",
    "mention",
    "use",
    "way_out",
]

GROUP = "fewstep.plugins"


@dataclass(frozen=True)
class Import:
    """A Python file by its absolute path, or a module by its dotted name.

    Attributes:
        place: path or name.
        sha256: hash of the file's content; empty for modules, and if any content is accepted.
    """

    place: str
    sha256: str = ""

    @classmethod
    def parse(cls, text: str, folder: Path = Path()) -> Import:
        """Read `my_method.py`, relative to a folder, `my_method.py#sha256=...` or `my_package.methods`.

        Raises:
            SettingsError: it is none of these.
        """
        place, _, sha256 = text.partition("#sha256=")
        if place.endswith(".py"):
            return cls(os.path.abspath(folder / Path(place).expanduser()), sha256)
        if not all(part.isidentifier() for part in place.split(".")):
            raise SettingsError(
                f"`imports` must name Python files or modules, got {text!r}. Try: my_method.py, or my_package.methods"
            )
        return cls(place, sha256)

    def __str__(self) -> str:
        return f"{self.place}#sha256={self.sha256}" if self.sha256 else self.place

    @property
    def is_file(self) -> bool:
        """True if it is a file, not a module."""
        return self.place.endswith(".py")

    def problem(self) -> str:
        """Reason why the file is not the intended one; empty if it is."""
        if not self.is_file:
            return ""
        if not os.path.isfile(self.place):
            return "does not exist"
        found = _sha256(Path(self.place).read_bytes())
        changed = self.sha256 not in ("", found)
        return f"has changed (sha256 must be {self.sha256[:8]}, got {found[:8]})" if changed else ""


_namespaces: dict[str, dict[str, Any]] = {}  # imported namespaces by path or name
_mentions: dict[Import, str] = {}  # imports named by model files -> the model file
_plugins: list[dict[str, Any]] = []
_looked_for_plugins = False


def use(entries: Sequence[str], folder: Path, by: str) -> tuple[str, ...]:
    """Import files and modules, each with a line on stderr; returns them with absolute paths and the sha256 of files.

    A file may import earlier files of the list by name.

    Args:
        entries: see `Import.parse`.
        folder: base of relative paths.
        by: the file or option that names them, for messages.

    Raises:
        SettingsError: one does not exist, has another sha256 than required, or cannot be imported.
    """
    read, siblings = [], []
    names = [Path(entry.place).name for text in entries if (entry := Import.parse(text, folder)).is_file]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsError(f"{by}: `imports` must have different file names, got two {min(twice)}. Try: rename one")
    try:
        for entry in (Import.parse(text, folder) for text in entries):
            if problem := entry.problem():
                raise SettingsError(
                    f"{by}: `imports` {entry.place} {problem}. Try: the original file (a run folder has a copy in imports/), or "
                    "--imports FILE for another"
                )
            if entry.is_file:
                entry = Import(entry.place, _sha256(Path(entry.place).read_bytes()))
            module = _load(entry, by)
            read.append(str(entry))
            if entry.is_file and (name := Path(entry.place).stem) not in sys.modules:
                sys.modules[name] = module
                siblings.append(name)
            _remember(entry)
    finally:
        for name in siblings:
            del sys.modules[name]
    return tuple(read)


def changed_imports(before: Sequence[str], now: Sequence[str], folder: Path) -> list[str]:
    """Differences between the imports of a run and those of its resumption; moved files are not a difference.

    Args:
        before: imports of the run in `folder`.
        now: imports of the resumption, with their sha256.
        folder: run folder, for messages.
    """
    old, new = [Import.parse(text, folder) for text in before], [Import.parse(text) for text in now]

    def same(one: Import, other: Import) -> bool:
        return one.sha256 == other.sha256 if one.sha256 else one.place == other.place

    if len(old) == len(new) and all(map(same, old, new)):
        return []
    kept = f" (the original code is kept in {folder / 'imports'})" if any(entry.is_file for entry in old) else ""
    return [f"imports was [{', '.join(map(str, old))}], now [{', '.join(map(str, new))}]{kept}"]


def keep_copies(entries: Sequence[str], folder: Path) -> None:
    """Copy imported files to a folder, as a record of the code that was run.

    Raises:
        SettingsError: a file has changed since it was imported.
        WriteError: it cannot be written.
    """
    for entry in map(Import.parse, entries):
        if problem := entry.problem():
            raise SettingsError(f"`imports` {entry.place} {problem}. Try: again")
        if entry.is_file:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / Path(entry.place).name, Path(entry.place).read_bytes())


def mention(entries: Sequence[str], by: str) -> None:
    """Record the imports that a model's file names; imports nothing yet."""
    _mentions.update({Import.parse(text): by for text in entries})


def follow_mentions() -> bool:
    """Import the recorded code that was imported on this machine before; returns whether there was any."""
    allowed = [(entry, by) for entry, by in _mentions.items() if _known(entry) and not entry.problem()]
    for entry, by in allowed:
        del _mentions[entry]
        use([str(entry)], Path(), by)
    return bool(allowed)


def way_out() -> str:
    """Advice for an unknown class, as the end of a sentence."""
    unknown = "was never imported on this machine, so its code is not trusted"
    reasons = [f"{entry.place} ({entry.problem() or unknown})" for entry in _mentions]
    if reasons:
        by = ", ".join(dict.fromkeys(_mentions.values()))
        return f". {by} was made with {'; '.join(reasons)}. Try: read the code, then --imports FILE,..."
    return ". Try: for your own class, `imports: [FILE.py]` in the run file, or --imports FILE"


def classes() -> list[type[Any]]:
    """Classes of imported code and of installed plugins.

    Raises:
        SettingsError: a plugin cannot be imported.
    """
    global _looked_for_plugins
    if not _looked_for_plugins:
        _looked_for_plugins = True
        for point in importlib.metadata.entry_points(group=GROUP):
            try:
                found = point.load()
            except Exception as error:  # outside code may raise any error
                _looked_for_plugins = False
                package = point.dist.name if point.dist else "a package"
                raise SettingsError(
                    f"the plugin {point.name} ({point.value}) of {package} cannot be imported ({type(error).__name__}: {error}). Try: repair {package}, "
                    "or uninstall it"
                ) from error
            _plugins.append(vars(found) if isinstance(found, ModuleType) else {point.name: found})
    spaces = [*_namespaces.values(), *_plugins]
    return list(dict.fromkeys(value for space in spaces for value in space.values() if isinstance(value, type)))


def forget() -> None:
    """Forget all imported and recorded code."""
    _namespaces.clear()
    _mentions.clear()


def _load(entry: Import, by: str) -> ModuleType:
    if "FEWSTEP_PARENT" not in os.environ:  # else the launcher has printed it
        note(f"importing {entry.place}, named by {by}")
    try:
        module = _execute(entry) if entry.is_file else importlib.import_module(entry.place)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # outside code may raise any error
        raise SettingsError(f"{by}: `imports` {entry.place} cannot be imported: {_said(error, entry)}") from error
    if all(vars(module) is not space for space in _namespaces.values()):
        _namespaces[entry.place] = vars(module)
    return module


def _said(error: Exception, entry: Import) -> str:
    """Format an error's message, with its type and its line in the imported file if the message alone is not enough."""
    if isinstance(error, (ImportError, SyntaxError)):
        return str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == entry.place]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def _execute(entry: Import) -> ModuleType:
    """Execute a file as a module; files of the same content are one module, whatever their path."""
    name = f"{Path(entry.place).stem}@{entry.sha256[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    source = Path(entry.place).read_bytes()
    if _sha256(source) != entry.sha256:
        raise SettingsError(f"{entry.place} was changed while it was read. Try: again")
    code = compile(source, entry.place, "exec", dont_inherit=True)  # without a bytecode cache
    module = ModuleType(name)
    module.__file__ = entry.place
    sys.modules[name] = module  # pydantic resolves annotations there
    done = False
    try:
        exec(code, module.__dict__)
        done = True
    finally:
        if not done:
            del sys.modules[name]
    return module


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _record() -> Path:
    """File that lists the code that a user named and imported on this machine."""
    return cache_folder() / "imported.txt"


def _key(entry: Import) -> str:
    return f"sha256 {entry.sha256}" if entry.is_file else f"module {entry.place}"


def _known(entry: Import) -> bool:
    return _record().is_file() and _key(entry) in _record().read_text(encoding="utf-8").splitlines()


def _remember(entry: Import) -> None:
    if _known(entry) or os.environ.get("RANK", "0") != "0":
        return
    try:
        _record().parent.mkdir(parents=True, exist_ok=True)
        with _record().open("a", encoding="utf-8") as file:
            file.write(f"{_key(entry)}\n")
    except OSError as error:
        note(f"{_record()} cannot be written ({error}): models made with {entry.place} will need --imports")
