"""The one table of numbers: digits, directions, and when a best one is marked."""

from typing import get_args

import pytest

from fewstep.evaluation.metrics import (
    ASKED,
    MEASURES,
    METRICS,
    Metric,
    best,
    columns_of,
    deciding,
    merit,
    notes_of,
    same,
    text_of,
)
from fewstep.evaluation.scores import Scores

BY_KEY = {column.key: column for column in MEASURES}


@pytest.mark.parametrize(
    ("key", "row", "text"),
    [
        ("fid", {"fid": 4.5}, "4.50"),
        ("fid", {"fid": 0.0041}, "0.0041"),
        ("fid", {"fid": 0.0}, "0.00"),
        ("fid", {"fid": 4.5, "fid_spread": 0.034}, "4.50 ± 0.03"),
        ("kid", {"kid": 0.000451, "kid_std": 0.0001}, "0.45 ± 0.10"),
        ("kid", {"kid": 4.5e-7}, "0.00045"),
        ("kid", {"kid": -0.0001}, "-0.10"),
        ("kid", {"kid": 0.001, "kid_std": 0.5, "kid_spread": 0.0001}, "1.00 ± 0.10"),
        ("isc", {"isc": 9.876, "isc_std": 0.123}, "9.88 ± 0.12"),
        ("clip_score", {"clip_score": 0.33456}, "0.335"),
        ("images_per_second", {"images_per_second": 12345.6}, "12,346"),
        ("images_per_second", {"images_per_second": 0.12345}, "0.123"),
        ("fid", {"fid": None}, None),
        ("fid", {"fid": float("nan")}, None),
        ("fid", {}, None),
    ],
)
def test_numbers_keep_their_digits(key, row, text):
    assert text_of(row, BY_KEY[key]) == text


def test_every_number_of_an_evaluation_has_a_place():
    fields = {name for name in Scores.__dataclass_fields__ if f"{name}_std" in Scores.__dataclass_fields__}
    assert (
        fields | {"fid", "precision", "recall", "density", "coverage"} == set(ASKED) == set(get_args(Metric))
        and ASKED[:4] == METRICS
    )
    assert {"patch_fid", "clip_score", "retrieval", "diversity", "chroma"} < BY_KEY.keys() - set(ASKED)
    assert BY_KEY["kid"].header == "KID × 10³" and BY_KEY["kid"].factor == 1000
    lower = {column.key for column in MEASURES if column.better == "lower"}
    higher = {column.key for column in MEASURES if column.better == "higher"}
    assert lower == {"fid", "patch_fid", "kid", "probe_distance"}
    assert higher == {"precision", "recall", "density", "coverage", "isc", "clip_score", "retrieval"}
    assert [column.key for column in columns_of([{"recall": 0.5}, {"fid": 1.0, "kid": None}])] == ["fid", "recall"]


def marked(rows, key):
    return [best(row, rows, BY_KEY[key]) for row in rows]


def test_the_best_is_marked_only_where_it_says_something():
    a, b = (
        {"protocol": "p", "n": 100, "judge": "j", "fid": fid, "recall": fid / 10, "chroma": fid} for fid in (2.0, 3.0)
    )
    a, b = a | {"clip_score": 0.3}, b | {"clip_score": 0.4}
    assert marked([a, b], "fid") == [True, False] and marked([a, b], "recall") == [False, True]
    assert marked([a, b], "clip_score") == [False, True]
    assert marked([a], "fid") == [False], "alone"
    assert marked([a, b], "chroma") == [False, False], "no direction"
    assert marked([a | {"images_per_second": 1}, b | {"images_per_second": 2}], "images_per_second") == [False, False]
    assert marked([a, b | {"protocol": "q"}], "fid") == [False, False], "measured differently"
    assert marked([a, b | {"n": 50}], "fid") == [False, False], "another number of samples"
    assert marked([a, b | {"judge": "k"}], "clip_score") == [False, False], "another judge"
    assert marked([a, b | {"judge": "k"}], "fid") == [True, False], "whom FID does not ask"
    assert marked([a | {"protocol": None}, b | {"protocol": None}], "fid") == [False, False], "nobody knows how"
    assert marked([a, b | {"fid": 2.001}], "fid") == [False, False], "equal as shown"
    assert marked([a, b | {"fid": None}], "fid") == [False, False], "one has no number"
    spread = {"repeat": 3, "fid_spread": 1.5}
    assert marked([a | spread, b | spread], "fid") == [False, False], "a lead within the spread"
    assert marked([a | spread, b | spread | {"fid": 4.0}], "fid") == [True, False]


def test_warnings_are_texts_not_letters():
    assert notes_of({"warnings": "a; b"}) == ["a; b"]
    assert notes_of({"warnings": ["a", "b"]}) == ["a", "b"]
    assert notes_of({"warnings": None}) == notes_of({}) == notes_of({"warnings": ""}) == []


def test_rows_are_the_same_only_if_everything_that_counts_is():
    row = {
        "sha256": "a",
        "calls": 1,
        "times": [1.0],
        "metrics": ["fid"],
        "protocol": "p",
        "precision_of_networks": "fp32",
    }
    assert same(row, dict(row, date="later", name="other"))
    for key, value in (("sha256", "b"), ("calls", 2), ("times", [0.5]), ("metrics", ["kid"]), ("guidance", 0.0), ("codec", "c"),
                       ("precision_of_networks", "bf16"), ("judge", "j"), ("patch_protocol", "q"), ("repeat", 2)):  # fmt: skip
        assert not same(row, row | {key: value})


def test_the_first_measure_with_a_direction_says_which_checkpoint_is_the_best():
    both = {"images_per_second": 9.0, "recall": 0.5, "fid": 4.0}
    assert merit(both) == 4.0 and merit({"diversity": 1.0, "recall": 0.5}) == -0.5
    assert merit({"fid": None, "kid": 0.001}) == 0.001 and merit({"chroma": 1.0}) is None
    assert deciding([{}, {"recall": 0.5}, both]).key == "fid" and deciding([]) is None
