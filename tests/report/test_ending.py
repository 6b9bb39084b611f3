"""What a run says when it ends, from folders of real runs."""

import json
from pathlib import Path

import pytest

from fewstep.cli import main as cli
from fewstep.report.ending import ending, finished
from tests.support.places import ROOT

RESULTS = ROOT / "docs" / "results"


def test_an_end_names_what_was_made_its_score_and_the_next_commands():
    folder = RESULTS / "fashion-mnist-dmd2"
    said = ending(folder).splitlines()
    assert said[0].startswith("finished: 32,000 images in 0:0")
    assert any(line.startswith("score:      FID ") for line in said)
    assert any(line.startswith("protocol:   small64-2571ca6f/fashion-mnist-train") for line in said)
    assert f"log:        {folder / 'stats.jsonl'}" in said
    start = said.index("next:")
    assert [line.split()[1] for line in said[start + 1 : -1]] == ["sample", "eval", "report", "export", "ui"]
    assert said[-1].strip() == "the same command with --train.images 64000 to train longer"


def test_the_best_of_a_run_scored_by_recall_is_its_highest(tmp_path):
    (tmp_path / "run.yaml").write_text("{kind: distill, train: {images: 30}}")
    lines = [{"images": x, "kind": "evaluation", "recall": y} for x, y in ((10, 0.2), (20, 0.8), (30, 0.5))]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "best:       recall 0.800 at 20 images" in ending(tmp_path).splitlines()


def test_a_text_to_image_run_is_exported_and_sampled_with_a_prompt():
    said = ending(RESULTS / "emoji" / "emoji-dmd2-4step-lora")
    assert "sample" in said and '--prompt "A PROMPT"' in said and "fewstep export" in said
    assert "CLIP score" in said and "retrieval" in said


@pytest.mark.parametrize("name", ["fashion-mnist-sid", "emoji/emoji-sid"])
def test_the_next_commands_are_commands(name):
    lines = ending(RESULTS / name).split("next:\n", 1)[1].splitlines()
    commands = [line.split()[1] for line in lines if line.strip().startswith("fewstep ")]
    assert commands and set(commands) <= set(cli.COMMANDS)


def test_a_finished_run_says_how_to_train_longer():
    assert finished(Path("runs/x"), 300) == (
        "runs/x is finished (300 images): nothing to train. To train longer: --train.images 600"
    )
