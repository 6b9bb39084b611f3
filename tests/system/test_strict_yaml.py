"""YAML that says something else than it seems to say is refused; exponents without a dot are numbers."""

import pytest
import yaml

from fewstep.system.strict_yaml import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "lines 1 and 3"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "lines 2 and 4"),
        ("- {a: 1, b: 2,\n   'a': 1}\n", "lines 1 and 2"),
        ("base: &base {a: 1}\nuser:\n  <<: *base\n  b: 1\n  b: 1\n", "lines 4 and 5"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(text, lines):
    with pytest.raises(yaml.YAMLError, match=f"given once, got it in {lines}"):
        read_yaml(text)


def test_a_merged_key_may_be_overridden():
    assert read_yaml("base: &base {a: 1, b: 2}\nuser: {<<: *base, a: 3}\n")["user"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1e6", 1e6), ("-2.5E+3", -2500.0), ("1.0e-4", 1e-4), ("1_000", 1000), ("0", 0), ("0.5", 0.5)],
)
def test_numbers_are_what_they_look_like(text, value):
    assert read_yaml(f"a: {text}")["a"] == value


@pytest.mark.parametrize("text", ["0100", "-017", "1:30", "1:00:00", "1:30.5", "0_7"])
def test_octal_and_base_60_numbers_are_refused(text):
    with pytest.raises(yaml.YAMLError, match="YAML reads"):
        read_yaml(f"a: 1\nb: {text}")


def test_texts_that_look_like_numbers_survive():
    values = {"a": "1e5", "b": "0100", "c": "08", "d": ["1:30", "12e", "yes"], "e": 1e-7, "f": None}
    assert read_yaml(write_yaml(values)) == values
