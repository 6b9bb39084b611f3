"""Other people's pickles, decoded as data: a table says what each name in them stands for, and nothing is executed.

A pickle is a program for a small stack machine. Here the machine has only the instructions that describe data, every
name is looked up in a table of inert records, and what could take for ever or all memory is refused. Layouts of
particular files are their readers' business.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fewstep.system.errors import FileError

__all__ = ["DAMAGE", "DataUnpickler", "Record", "Table"]


# everything that the pure-Python unpickler and the records below raise on bytes that make no sense
DAMAGE = (
    pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError,
    UnicodeError, AssertionError, struct.error, MemoryError, RecursionError, RuntimeError,
)  # fmt: skip


KEYS = (str, bytes, int)


class Record:
    """An object of the file: what it was made from, and its state. Does nothing."""

    made_from: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.made_from = arguments


class Table(dict[Any, Any]):
    """A class of dict (OrderedDict, EasyDict): it starts empty and is filled item by item."""

    def __init__(self, *arguments: Any) -> None:
        if any(arguments):
            raise FileError("a dict that is made from something")
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
    """The standard library's unpickler, the one in Python, with the operations that such files use and no others.

    Its memo is a dict; the one in C allocates what an index claims. Keys are text, bytes or numbers only: hashing
    nested tuples can take for ever.
    """

    names: ClassVar[Mapping[tuple[str, str], Any]] = {}
    """(module, name) -> what it stands for."""
    what: ClassVar[str] = "this file"
    """For messages."""
    if TYPE_CHECKING:  # the machine of the standard library's class, of which its stubs say nothing
        stack: list[Any]

        def pop_mark(self) -> list[Any]: ...

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise FileError(f"it asks for {module}.{name}, which {self.what} does not need: do not trust it") from None

    def persistent_load(self, pid: Any) -> Any:
        raise FileError("it points outside of itself")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _set_items(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if not isinstance(target, dict) or not all(type(key) in KEYS for key in keys) or len(items) % 2:
            raise FileError("a table with odd keys")
        target.update(zip(keys, items[1::2], strict=True))

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set) or not all(type(item) in KEYS for item in items):
            raise FileError("a set of odd things")
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
