"""Published protocols: sizes, frames, patch FID and CLIP score, with random networks in place of the published weights."""

import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation.extractor import Extractor
from fewstep.evaluation.features import Framed, Inception
from fewstep.evaluation.protocols import OPEN_CLIP_G, PROTOCOLS, ClipScore, Protocol, find_protocol
from fewstep.evaluation.reference import StreamingStats, find_reference
from fewstep.evaluation.resize import centre, resized, square
from fewstep.evaluation.scores import evaluate, frechet_distance
from fewstep.evaluation.small_features import Pixels
from fewstep.system.errors import EvaluationError


@pytest.fixture(scope="module")
def inception():
    return Inception.random()


def images(count, side, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def test_resized_is_pil_on_the_whole_picture():
    picture = images(1, 40)
    whole = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(resized(picture, 16)[0].permute(1, 2, 0).numpy(), np.asarray(whole))
    assert resized(picture, 40) is picture


def test_central_crops_begin_where_torchvisions_do():
    from torchvision.transforms.functional import center_crop

    for height, width in ((299, 299), (300, 302), (1024, 1024), (480, 640), (425, 640), (427, 301)):
        picture = images(1, 1024)[:, :, :height, :width]
        top, left = centre(height, 299), centre(width, 299)
        assert torch.equal(picture[:, :, top : top + 299, left : left + 299], center_crop(picture, [299, 299]))
        assert torch.equal(square(picture), center_crop(picture, [min(height, width)] * 2))


def test_frames_show_inception_what_they_say(inception):
    """A patch is the central 299 pixels as they are; a clean picture was resized in floating point and never rounded."""
    picture = images(1, 322)
    patch = picture[:, :, 12:311, 12:311]  # (322 - 299) / 2 = 11.5, to the even side
    assert torch.equal(Framed(inception, "patch")(picture), inception(patch))
    planes = [
        np.asarray(Image.fromarray(plane.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
        for plane in picture[0].numpy()
    ]
    clean, seen = torch.from_numpy(np.stack(planes)).clamp(0, 255), []
    handle = inception.net.Conv2d_1a_3x3.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    found = Framed(inception, "clean")(picture)
    handle.remove()
    torch.testing.assert_close(seen[0][0], (clean - 128) / 128)
    assert not torch.equal(found, inception(clean.round().to(torch.uint8)[None])), "fractions are kept"
    torch.testing.assert_close(found, inception(clean.round().to(torch.uint8)[None]), rtol=0.05, atol=0.05)
    whole = images(1, 299)
    torch.testing.assert_close(Framed(inception, "clean")(whole), inception(whole))
    names = {inception.sha256, Framed(inception, "clean").sha256, Framed(inception, "patch").sha256}
    assert len(names) == 3 and Framed(inception, "clean").name == "inception-random-clean299"
    with pytest.raises(EvaluationError, match=r"at least 299 pixels wide for patch FID, got \[3, 256, 256\]"):
        Framed(inception, "patch")(images(1, 256))


def write(folder, pictures):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return str(folder)


def test_both_sides_are_brought_to_size_in_the_same_way(tmp_path):
    """Real images in files of many shapes, resized by the reader, have the statistics of samples resized by the scorer."""
    pictures = images(6, 24)
    wide = torch.cat(
        [torch.zeros(6, 3, 24, 5, dtype=torch.uint8), pictures, torch.zeros(6, 3, 24, 5, dtype=torch.uint8)], 3
    )
    folder = write(tmp_path / "wide", wide)
    pixels = Pixels((3, 8, 8))
    reference = find_reference(folder, pixels, (3, 8, 8), 8)
    scores = evaluate([resized(pictures, 8)], reference, pixels, metrics=["fid"], seen="lanczos8-uint8")
    assert scores.fid == pytest.approx(0, abs=1e-4) and scores.protocol.endswith("/6/lanczos8-uint8")


def test_what_the_authors_programs_do():
    """DMD2's test_folder_sdxl.py --eval_res 512 --total_eval_samples 10000 and test_folder_sd.py --eval_res 256."""
    sdxl, sd = find_protocol("sdxl-10k"), find_protocol("coco-30k")
    assert (sdxl.samples, sdxl.native, sdxl.side, sdxl.patch, sdxl.real) == (10_000, 1024, 512, True, 10_000)
    assert (sd.samples, sd.native, sd.side, sd.patch) == (30_000, 512, 256, False)
    for protocol in (sdxl, sd):
        assert protocol.clip is OPEN_CLIP_G and (protocol.clip.side, protocol.clip.prefix) == (256, "A photo depicts ")
        protocol.check(protocol.samples, (3, protocol.native, protocol.native), protocol.samples, "auto")
    with pytest.raises(EvaluationError, match="must be one of coco-30k, sdxl-10k, got 'coco'"):
        find_protocol("coco")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 5_000}, "`samples` must be 10000 for sdxl-10k, got 5000"),
        ({"shape": (3, 512, 512)}, r"1024 x 1024 pixels for sdxl-10k, got \[3, 512, 512\]"),
        ({"shape": (3, 1023, 1024)}, r"got \[3, 1023, 1024\]"),
        ({"shape": (3, 2048, 2048)}, r"got \[3, 2048, 2048\]"),
        ({"shape": (1, 1024, 1024)}, r"colour images .* got \[1, 1024, 1024\]"),
        ({"shape": (2,)}, r"got \[2\]"),
        ({"captions": 30_000}, "must have 10,000 captions for sdxl-10k, got 30,000"),
        ({"captions": 0}, "captions for sdxl-10k, got 0"),
        ({"extractor": "clip"}, "`extractor` must be inception for sdxl-10k, got clip"),
    ],
)
def test_a_protocol_refuses_what_contradicts_it(change, message):
    good = {"samples": 10_000, "shape": (3, 1024, 1024), "captions": 10_000, "extractor": "auto"}
    find_protocol("sdxl-10k").check(**good)
    with pytest.raises(EvaluationError, match=message):
        find_protocol("sdxl-10k").check(**good | change)


def test_a_protocols_reference_is_a_folder_of_at_most_its_images(tmp_path):
    protocol = Protocol("tiny", 2, 24, 8, True, 2, "")
    folder = write(tmp_path / "real", images(3, 24))
    with pytest.raises(EvaluationError, match=r"at most 2 images for tiny, .* with 3"):
        protocol.measures(folder, Blocks())
    for name in ("coco.npz", str(tmp_path / "real.zip")):
        with pytest.raises(EvaluationError, match="`reference` must be a folder of the real images for tiny"):
            protocol.measures(name, Blocks())


def test_patches_of_real_images_are_never_resized(tmp_path, monkeypatch):
    """Photographs of many shapes: their central pixels as they are. One that is smaller is stretched, as the authors do."""
    monkeypatch.setattr(Framed, "SIDE", 10)
    pictures = [images(1, 40, seed)[0, :, :height, :width] for seed, (height, width) in enumerate(((40, 13), (21, 40)))]
    folder = write(tmp_path / "real", pictures)
    _, _, (patches, measure) = Protocol("tiny", 2, 24, 8, True, None, "").measures(folder, Blocks())
    crops = torch.stack([pictures[0][:, 15:25, 2:12], pictures[1][:, 6:16, 15:25]])  # 1.5 and 5.5: to the even side
    np.testing.assert_allclose(patches.mu, Blocks()(crops).double().mean(0), rtol=1e-6)
    assert patches.n == 2 and patches.shape == (3, 10, 10) and "patch10" in measure.name
    Image.fromarray(images(1, 6)[0].permute(1, 2, 0).numpy()).save(tmp_path / "real" / "small.png")
    _, _, (patches, _) = Protocol("tiny", 2, 24, 8, True, None, "").measures(folder, Blocks())
    assert patches.n == 3


def tiny_score(folder, **changes):
    """The protocols' CLIP score around a tiny model."""
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config = {"vision_config.patch_size": 8, "projection_dim": 16}
    processor = {"size": {"shortest_edge": 16}, "image_mean": OPEN_CLIP_G.processor["image_mean"]}
    given = {"sha256": sha256, "config": config, "processor": processor, "side": 20, "prefix": "A photo depicts "}
    return ClipScore("Tiny CLIP", "a folder", **given | changes)


def test_clip_score_of_the_authors(tmp_path):
    """Central square, Lanczos to `side`, PIL's bicubic filter to the model's size; the prefix before every caption."""
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip import CLIPImageProcessor

    from tests.support.pipelines import tiny_clip

    folder = tiny_clip(tmp_path / "clip")
    judge, plain = tiny_score(folder).load(folder), tiny_score(folder, side=None, prefix="").load(folder)
    picture = images(1, 48)[:, :, :37]
    left = centre(48, 37)
    pil = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).crop((left, 0, left + 37, 37))
    pil = pil.resize((20, 20), Image.Resampling.LANCZOS).resize((16, 16), Image.Resampling.BICUBIC)
    pixels = CLIPImageProcessor.from_pretrained(folder, do_resize=False)(images=[pil], return_tensors="pt").pixel_values
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        ["A photo depicts a cat"], padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        both = model(**ids, pixel_values=pixels)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(judge(picture)), both.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unit(judge.texts(["a cat"])), both.text_embeds, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(judge.texts(["a cat"]), plain.texts(["a cat"]))
    assert judge.id == f"clip-clip-{judge.sha256[:8]}/lanczos20/prefix 'A photo depicts'" and plain.id == judge.id[:18]
    # a long caption is cut, its end stays
    long = tokenizer(["A photo depicts " + "cat " * 50], padding="max_length", max_length=12, truncation=True)
    assert long["input_ids"][0][-1] == tokenizer.eos_token_id


def test_another_clip_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from tests.support.pipelines import tiny_clip

    folder = tiny_clip(tmp_path / "clip")
    with pytest.raises(
        EvaluationError,
        match=r"must be OpenCLIP ViT-g-14 \(laion2b_s12b_b42k\), got .*projection_dim 16 instead of 1024",
    ):
        OPEN_CLIP_G.load(folder)
    for changes, message in (
        ({"config": {"vision_config.patch_size": 14}}, "vision_config.patch_size 8 instead of 14"),
        ({"config": {"vision_config.hidden_act": "gelu"}}, "hidden_act 'quick_gelu' instead of 'gelu'"),
        ({"processor": {"size": {"shortest_edge": 224}}}, "size .* instead of"),
        ({"processor": {"image_mean": (0.5, 0.5, 0.5)}}, "image_mean .* instead of"),
        ({"sha256": "0" * 64}, "model.safetensors has sha256 [0-9a-f]{64} instead of 0000"),
    ):
        with pytest.raises(
            EvaluationError, match=f"`clip` must be Tiny CLIP, got .*{message}.*Try: a copy of a folder"
        ):
            tiny_score(folder, **changes).load(folder)
    score = tiny_score(folder)
    (folder / "model.safetensors").rename(folder / "kept")
    with pytest.raises(EvaluationError, match=r"model\.safetensors|cannot be read"):
        score.load(folder)


def test_the_published_clips_architecture_is_openclips():
    """ViT-g-14.json of open_clip 2.x and its preprocessing; the shapes are those of the published 5.47 GB file in float32."""
    pytest.importorskip("transformers")
    from transformers import CLIPConfig, CLIPModel

    config = OPEN_CLIP_G.config
    parts = {
        part: {name.split(".")[1]: value for name, value in config.items() if name.startswith(part)}
        for part in ("vision_config", "text_config")
    }
    assert parts["vision_config"]["intermediate_size"] == int(1408 * 4.3637)
    assert parts["vision_config"]["num_attention_heads"] == 1408 // 88
    text = {"intermediate_size": 4096}  # not checked by the protocol: its weights' hash is
    with torch.device("meta"):
        model = CLIPModel(
            CLIPConfig(
                text_config=parts["text_config"] | text, vision_config=parts["vision_config"], projection_dim=1024
            )
        )
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert size == pytest.approx(5.47e9, rel=2e-3)


def test_the_authors_pickled_prompts_are_read_without_executing(tmp_path):
    from fewstep.system.errors import DataError
    from fewstep.teachers.prompts import read_prompt_file

    file = tmp_path / "all_prompts.pkl"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps(["a cat", "zwei Hünde", "a cat"], protocol=protocol))
        assert read_prompt_file(file) == ["a cat", "zwei Hünde", "a cat"]
    for bad, message in (
        ({"a": 1}, "holds no list of texts"),
        (["a", None], "holds no list of texts"),
        (print, "refers to"),
    ):
        file.write_bytes(pickle.dumps(bad))
        with pytest.raises(DataError, match=message):
            read_prompt_file(file)


class Blocks(Extractor):
    """Means of a 4 x 4 grid: an extractor of 48 features that takes any size."""

    name, sha256, dim, device = "blocks", "0" * 64, 48, torch.device("cpu")

    def _check_shape(self, shape):
        assert shape[0] == 3

    def _features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def test_a_protocol_from_the_command_line(tmp_path, monkeypatch, capsys):
    """FID and patch FID of a teacher equal those computed by hand from the pictures that `sample` writes; sizes are scaled down."""
    pytest.importorskip("diffusers")
    from torchvision.transforms.functional import pil_to_tensor

    import fewstep.evaluation.compare
    from fewstep.cli.main import main
    from tests.support.pipelines import tiny_clip, tiny_sdxl

    sdxl, clip = tiny_sdxl(tmp_path / "sdxl"), tiny_clip(tmp_path / "clip")
    monkeypatch.setattr(fewstep.evaluation.compare, "extractor_for", lambda *_: Blocks())
    monkeypatch.setattr(Framed, "SIDE", 10)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan owl\na fox\n")
    assert main(["prepare", str(sdxl), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "p")]) == 0
    real = write(tmp_path / "real", images(4, 24, seed=1))
    common = [str(sdxl), "--prompts", str(tmp_path / "p"), "--evaluations", "2"]
    command = ["eval", *common, "--reference", real, "--metrics", "fid", "--out", str(tmp_path / "out.json")]
    command += ["--processes", "1", "--clip", str(clip), "--protocol", "tiny", "--precision", "fp32"]
    tiny = Protocol("tiny", 4, 16, 13, True, 4, "", tiny_score(clip))
    for wrong, message in (
        (
            replace(tiny, native=300),
            "the model must draw colour images of 300 x 300 pixels for tiny, got",
        ),
        (replace(tiny, samples=5), "must have 5 captions for tiny, got 4"),
        (replace(tiny, clip=OPEN_CLIP_G), "`clip` must be OpenCLIP ViT-g-14"),
        (replace(tiny, real=3), "at most 3 images for tiny"),
    ):
        monkeypatch.setitem(PROTOCOLS, "tiny", wrong)
        assert main(command) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setitem(PROTOCOLS, "tiny", tiny)
    assert main([*command, "--samples", "2"]) == 1
    assert "`samples` must be 4 for tiny, got 2" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr().out
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["n"] == 4 and row["protocol"].endswith("/4/lanczos13-uint8") and "clip_score" in row
    assert row["judge"].endswith("/lanczos20/prefix 'A photo depicts'")
    assert row["patch_protocol"].startswith("blocks-patch10-") and row["patch_protocol"].endswith("/4/uint8")
    for key in ("protocol", "patch_protocol", "judge"):
        assert row[key] in printed
    assert "4 images for 48 features: the covariance is singular, patch FID is biased" in printed
    assert "retrieval among 4 captions instead of 100" in printed

    assert main(["sample", *common, "--seeds", "0-3", "--out", str(tmp_path / "drawn")]) == 0
    drawn, kept = (
        torch.stack([pil_to_tensor(Image.open(file)) for file in sorted((tmp_path / folder).glob("*.png"))])
        for folder in ("drawn", "real")
    )
    for metric, frame in (("fid", "clean"), ("patch_fid", "patch")):
        both = []
        for pictures in (drawn, kept):
            stats = StreamingStats(Blocks.dim)
            # patches are taken from the pictures as they are, whole ones are seen at 13 pixels
            stats.update(Framed(Blocks(), frame)(resized(pictures, 13) if frame == "clean" else pictures))
            both += [stats.mu(), stats.sigma()]
        assert row[metric] == pytest.approx(frechet_distance(*both), rel=1e-3)
    judge = tiny.clip.load(clip)
    texts = judge.texts(["a cat", "a dog", "an owl", "a fox"])
    assert row["clip_score"] == pytest.approx(torch.cosine_similarity(judge(drawn), texts).mean().item(), rel=1e-4)
