"""YAML without its traps: duplicate keys and numbers in other bases (YAML 1.1) are refused, 1e-4 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fewstep.system.bounds import DEPTH, NODES, TEXT_BYTES

__all__ = ["read_yaml", "write_yaml"]

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")  # YAML 1.1 requires 1.0e-4


class _Loader(yaml.SafeLoader):
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.composed += 1
        if self.composed > NODES:
            raise yaml.YAMLError(f"it must have at most {NODES:,} values")
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _expanded(node, {}, 0)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before merge keys (<<) are resolved, which may override
        first: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            before = first.setdefault(key.value, key)
            if before is not key:
                lines = f"lines {before.start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} must be given once, got it in {lines}",
                    problem_mark=key.start_mark,
                )
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Read a number; refuse those that YAML 1.1 reads as octal (0100 is 64) or base 60 (1:30 is 90)."""
        is_float = node.tag == _FLOAT
        number = self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)
        if ":" in node.value or (not is_float and re.match(r"[-+]?0[0-9_]", node.value)):
            raise yaml.constructor.ConstructorError(
                problem=f"YAML reads {node.value} as {number}. Try: write {number}, or quote it if it is a text",
                problem_mark=node.start_mark,
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor(_FLOAT, _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that look like numbers to `_Loader`."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+0123456789"))


def _expanded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the values below a node, those of an alias wherever it is used: they are as many as a reader would visit."""
    if depth > DEPTH:
        raise yaml.YAMLError(f"it must not be nested deeper than {DEPTH} levels, or contain itself")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
        count = 1
        for pair in pairs:
            count += sum(_expanded(part, known, depth + 1) for part in pair)
            if count > NODES:
                raise yaml.YAMLError(f"it must have at most {NODES:,} values (an alias counts wherever it is used)")
        known[id(node)] = count
    return known[id(node)]


def read_yaml(text: str | bytes) -> Any:
    """Read one YAML document like `yaml.safe_load`, but without the traps named above, and of bounded size.

    Raises:
        yaml.YAMLError: invalid YAML, a duplicate key, a number in octal or base 60, or more bytes, values or levels than
            any run has.
    """
    if len(text) > TEXT_BYTES:
        raise yaml.YAMLError(f"it must have at most {TEXT_BYTES:,} bytes, got {len(text):,}")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError(f"it must not be nested deeper than {DEPTH} levels") from None
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:  # dates and numbers that do not exist, empty tags
        raise yaml.YAMLError(f"it holds a value that cannot be read ({error})") from None


def write_yaml(values: Any) -> str:
    """Write a YAML document that `read_yaml` reads back, with keys in the given order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=110)
