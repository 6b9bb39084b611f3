"""Decoder of other people's pickles as data: a table maps each name to an inert record, and nothing is executed.

A pickle is a program for a small stack machine. This machine has only the instructions that describe data, looks up every
name in the table, and refuses input that could run forever or take all memory. The readers of particular files know their
layouts.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fewstep.system.bounds import shown
from fewstep.system.errors import FileError

__all__ = ["DAMAGE", "DataUnpickler", "Record", "Table", "bytes_of_text"]


# errors of the pure-Python unpickler and of the records below on invalid bytes
DAMAGE = (
    pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError,
    UnicodeError, AssertionError, struct.error, MemoryError, RecursionError, RuntimeError,
)  # fmt: skip


KEYS = (str, bytes, int)


class Record:
    """An object of the file: its constructor's arguments and its state. Inert."""

    made_from: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.made_from = arguments


def bytes_of_text(*arguments: Any) -> bytes:
    """Bytes as protocols below 3 store them: `_codecs.encode(text, "latin1")`."""
    if not (1 <= len(arguments) <= 2 and isinstance(arguments[0], str) and arguments[1:] in ((), ("latin1",))):
        raise FileError("bytes in an unknown encoding")
    return arguments[0].encode("latin1")


class Table(dict[Any, Any]):
    """A dict class (OrderedDict, EasyDict): starts empty and is filled item by item."""

    def __init__(self, *arguments: Any) -> None:
        if any(arguments):
            raise FileError("a dict with constructor arguments")
        super().__init__()


_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE,
    pickle.BINUNICODE8, pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8, pickle.EMPTY_TUPLE, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT,
    pickle.EMPTY_SET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.MEMOIZE, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPERSID, pickle.SHORT_BINSTRING, pickle.BINSTRING,
)  # fmt: skip


class DataUnpickler(pickle._Unpickler):
    """The standard library's pure-Python unpickler, limited to the operations that such files use.

    Its memo is a dict; the C version allocates whatever size an index claims. Keys are text, bytes or numbers: hashing
    nested tuples can take forever.
    """

    names: ClassVar[Mapping[tuple[str, str], Any]] = {}
    """(module, name) -> inert record."""
    what: ClassVar[str] = "this file"
    """For messages."""
    if TYPE_CHECKING:  # attributes of the standard library's class that its stubs omit
        stack: list[Any]

        def pop_mark(self) -> list[Any]: ...

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise FileError(
                f"it refers to {shown(f'{module}.{name}', quote=False)}, which {self.what} does not need: do not trust it"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise FileError("it refers to data outside of itself")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _set_items(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if not isinstance(target, dict) or not all(type(key) in KEYS for key in keys) or len(items) % 2:
            raise FileError("a table with unsupported keys")
        target.update(zip(keys, items[1::2], strict=True))

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set) or not all(type(item) in KEYS for item in items):
            raise FileError("a set with unsupported items")
        target.update(items)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, Table):
            raise FileError(f"a {type(target).__name__} with a state")

    dispatch: ClassVar[dict[int, Any]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES} | {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.ADDITEMS[0]: _add_items,
        pickle.BUILD[0]: _build,
    }
