"""CLIP as features and as judge of captions, against closed forms and transformers' own pipeline."""

import json

import pytest
import torch

from fewstep.system.errors import EvaluationError

pytest.importorskip("transformers")

from fewstep.cli.main import main
from fewstep.evaluation.agreement import agreement, chroma, diversity
from fewstep.evaluation.features import Clip, extractor_for
from tests.support.pipelines import tiny_clip, tiny_sdxl


class Table:
    """A judge whose embeddings are given."""

    def __init__(self, **rows):
        self.rows = {name: torch.tensor(row, dtype=torch.float32) for name, row in rows.items()}

    def texts(self, captions):
        return torch.stack([self.rows[caption] for caption in captions])


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_agreement_by_hand():
    judge = Table(cat=[2.0, 0.0, 0.0], dog=[0.0, 1.0, 0.0], owl=[0.0, 0.0, 1.0])
    pictures = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 3.0, 4.0], [5.0, 0.0, 0.0]])
    found = agreement(judge, pictures, ["cat", "dog", "dog", "owl"])
    assert found["clip_score"] == pytest.approx((1 + 0.5**0.5 + 0.6 + 0) / 4)
    assert found["retrieval"] == 1 / 4  # the second is as near to the owl as to the dog: not found


def test_rivals_are_other_captions_all_equally_often():
    """With 99 rivals of 199, a picture that only one wrong caption beats is found half of the time."""
    names = [f"{i}" for i in range(200)]
    rows = torch.eye(200)
    judge = Table(**{name: row.tolist() for name, row in zip(names, rows, strict=True)})
    pictures = rows + 2 * rows.roll(37, 0)
    found = agreement(judge, pictures, names)["retrieval"]
    assert 0.35 < found < 0.65
    assert agreement(judge, pictures, names)["retrieval"] == found


def test_what_cannot_agree_is_said():
    judge = Table(cat=[1.0], dog=[1.0])
    with pytest.raises(EvaluationError, match="must be one per picture, got 1 for 2 pictures"):
        agreement(judge, torch.ones(2, 1), ["cat"])
    with pytest.raises(EvaluationError, match="two different captions"):
        agreement(judge, torch.ones(2, 1), ["cat", "cat"])


def test_diversity_by_hand():
    same = torch.ones(2, 3, 4)
    assert diversity(same) == pytest.approx(0, abs=1e-12)
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], [[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]])
    assert diversity(features) == pytest.approx(((1 + 2 + 1) / 3 + 0) / 2)


def test_chroma_by_hand():
    grey, red = torch.full((1, 3, 2, 2), 77, dtype=torch.uint8), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0, 0] = 255  # the upper half of a black picture
    assert chroma(grey) == 0 and chroma(red) == 0.5 and chroma(torch.cat([grey, red])) == 0.25


def test_embeddings_are_those_of_transformers(judge):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    clip = Clip(judge)
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    model, processor = CLIPModel.from_pretrained(judge), CLIPImageProcessor.from_pretrained(judge)
    tokens = AutoTokenizer.from_pretrained(judge)(["a cat", "dog"], padding=True, return_tensors="pt")
    pixels = processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        both = model(**tokens, pixel_values=pixels)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(clip(images)), both.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unit(clip.texts(["a cat", "dog"])), both.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip(images[:1]), clip(images)[:1])
    assert clip(images[:, :1]).shape == (3, 16)


def test_its_hash_changes_with_weights_and_preprocessing(judge, tmp_path):
    here = Clip(judge).sha256
    assert Clip(tiny_clip(tmp_path / "same")).sha256 == here
    assert Clip(tiny_clip(tmp_path / "other", seed=1)).sha256 != here
    file = tmp_path / "same" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    assert Clip(tmp_path / "same").sha256 != here
    config = tiny_clip(tmp_path / "third") / "config.json"
    settings = json.loads(config.read_text())
    settings["vision_config"]["hidden_act"] = "gelu"
    config.write_text(json.dumps(settings))
    assert Clip(tmp_path / "third").sha256 != here


def test_no_clip_model_is_said(tmp_path):
    with pytest.raises(EvaluationError, match=r"must be the folder of a CLIP model \(config.json"):
        Clip(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"must hold preprocessor_config.json, which sets"):
        Clip(tmp_path)
    cut = tiny_clip(tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(EvaluationError, match="cannot be read as a CLIP model"):
        Clip(tmp_path / "cut")
    with pytest.raises(EvaluationError, match="must be given for the extractor 'clip'"):
        extractor_for((3, 16, 16), "clip")


@pytest.mark.slow
def test_a_pipeline_is_judged_from_the_command_line(judge, tmp_path, capsys):
    """Teacher at two numbers of evaluations, in CLIP's features, with agreement and diversity in table and file."""
    from PIL import Image

    sdxl = tiny_sdxl(tmp_path / "sdxl")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nan owl\n")
    assert main(["prepare", str(sdxl), "--prompts", str(prompts), "--out", str(tmp_path / "p")]) == 0
    real = tmp_path / "real"
    real.mkdir()
    for number in range(12):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(real / f"{number}.png")
    out = tmp_path / "scores.json"
    command = ["eval", str(sdxl), "--prompts", str(tmp_path / "p"), "--reference", str(real), "--extractor", "clip"]
    command += ["--samples", "8", "--evaluations", "3", "--metrics", "fid", "--out", str(out), "--processes", "1"]
    assert main([*command, "--clip", str(judge)]) == 0
    row = json.loads(out.read_text())["rows"][0]
    assert -1 <= row["clip_score"] <= 1 and 0 <= row["retrieval"] <= 1 and row["diversity"] > 0
    assert 0 < row["chroma"] < 1
    assert row["judge"] == f"clip-tiny-{Clip(judge).sha256[:8]}" and row["protocol"].startswith("clip-tiny-")
    assert "retrieval" in capsys.readouterr().out
    assert main([*command[:-1], "1"]) == 1
    assert "must be given for the extractor 'clip', got none. Try: --clip FOLDER" in capsys.readouterr().err


def test_a_model_without_captions_is_not_judged(judge):
    from fewstep.evaluation.scorer import Scorer
    from fewstep.evaluation.small_features import Pixels
    from fewstep.system.errors import EvaluationError
    from fewstep.teachers import ClassLabels

    scorer = Scorer(None, Pixels((1, 2, 2)), 4, clip=Clip(judge))
    for conditioner in (ClassLabels(0), ClassLabels(3)):
        with pytest.raises(EvaluationError, match=r"`evaluation.clip` must be left out"):
            scorer.score(None, (1, 2, 2), conditioner)
