"""Build a small text-to-image data set and pipeline from scratch: captioned pictures, text encoder, VAE, SDXL pipeline.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0     # 2 files, 110 MB
    python examples/emoji_world.py --out world                                  # half an hour on 2 CPU cores

Then `fewstep pretrain emoji/teacher` trains the pipeline's UNet, and the recipes `emoji/...` distil it. The pipeline has all
components of SDXL, at a four-hundredth of its size, so every step from captions to a LoRA file in ComfyUI can be run and
measured on a laptop without downloading weights.

The pictures are emoji of animals, plants and food in two styles (Noto, by Google, Apache-2.0; Twemoji, CC-BY 4.0,
https://github.com/jdecked/twemoji) at 32 x 32 pixels on plain backgrounds. A caption is the emoji's own Unicode name; half of them also name the background,
a third the style. A caption may omit style and background: a good model answers "rose" with both styles and all
backgrounds, which makes a model's variety measurable. One combination of emoji, style and background in ten is held out
for evaluation (`val`): no training sees these pictures, although their captions may occur in training.

`judge` is a second CLIP with another seed, trained on the same real pictures; it is used only for evaluation.
`limits.json` holds its scores of real pictures, and of real pictures through the VAE: upper bounds for any model.

Every step writes its result to its own path and is skipped if that exists, so the same command resumes an interrupted run. To
build another size, delete the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

SIDE = 32  # pixels
TOKENS = 20  # of a caption; the longest has 12
KINDS = ("Animals & Nature", "Food & Drink")  # two of nine; all of them take more than an hour of training (LOG.md)
VENDORS = {"noto": "google", "twemoji": "twitter"}
BACKGROUNDS = {
    "white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "red": (214, 40, 40), "orange": (247, 127, 0),
    "yellow": (252, 211, 77), "green": (56, 142, 60), "blue": (40, 90, 200), "purple": (123, 44, 191), "pink": (255, 173, 199),
}  # fmt: skip


# Pictures


def read_package(file: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Read the records and the 64-pixel PNG files of an npm package `emoji-datasource-...`."""
    with tarfile.open(file) as tar:
        files = {
            member.name: tar.extractfile(member).read() for member in tar if member.isfile() and "/64/" in member.name
        }
        records = json.load(tar.extractfile("package/emoji.json"))
    return records, {name.rsplit("/", 1)[1]: content for name, content in files.items()}


def read_emoji(packages: dict[str, Path]) -> dict[tuple[str, str], Image.Image]:
    """Read the emoji of all packages, by name and style."""
    emoji: dict[tuple[str, str], Image.Image] = {}
    for style, package in packages.items():
        records, files = read_package(package)
        for record in records:
            if record["has_img_google"] and record["has_img_twitter"] and record["category"] in KINDS:
                image = Image.open(BytesIO(files[record["image"]])).convert("RGBA")
                emoji[" ".join(record["name"].lower().split()), style] = image
    return emoji


def composed(emoji: Image.Image, background: str, rng: random.Random) -> Image.Image:
    """Place an emoji on a plain background, with slightly varied size and position."""
    side = rng.randint(round(0.78 * SIDE), round(0.95 * SIDE))
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background])
    free = SIDE - side
    corner = tuple(min(free, max(0, free // 2 + rng.randint(-1, 1))) for _ in range(2))
    small = emoji.resize((side, side), Image.Resampling.LANCZOS)
    picture.paste(small, corner, small)
    return picture


def caption(name: str, style: str, background: str, rng: random.Random) -> str:
    """Return the caption of a picture."""
    words = name
    if rng.random() < 1 / 3:
        words = f"{style} {words}"
    if rng.random() < 1 / 2:
        words += f" on {'an' if background == 'orange' else 'a'} {background} background"
    return words


def kept_for_evaluation(name: str, style: str, background: str) -> bool:
    """Return whether a combination is held out: one in ten, by its hash."""
    return hashlib.sha256(f"{name}/{style}/{background}".encode()).digest()[0] < 26


def make_pictures(out: Path, emoji: dict[tuple[str, str], Image.Image], train: int, val: int) -> None:
    """Write `train` and `val`: folders of PNG files with a captions.jsonl each."""
    combinations = [(*key, background) for key in sorted(emoji) for background in BACKGROUNDS]
    print(f"{len(emoji):,} emoji in {len(VENDORS)} styles, {len(combinations):,} combinations with a background")
    for split, count in (("train", train), ("val", val)):
        if (out / split / "captions.jsonl").exists():
            continue
        rng = random.Random(split)
        chosen = [c for c in combinations if kept_for_evaluation(*c) == (split == "val")]
        rows = []
        (out / split).mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(count), desc=split):
            if number % len(chosen) == 0:
                rng.shuffle(chosen)
            name, style, background = chosen[number % len(chosen)]
            file = f"{number:06d}.png"
            composed(emoji[name, style], background, rng).save(out / split / file)
            rows.append(json.dumps({"file_name": file, "caption": caption(name, style, background, rng)}))
        (out / split / "captions.jsonl").write_text("\n".join(rows) + "\n")


def read_pictures(folder: Path) -> tuple[Tensor, list[str]]:
    """Read pictures as uint8 [N, 3, SIDE, SIDE], and their captions."""
    from torchvision.transforms.functional import pil_to_tensor

    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    pictures = torch.stack([pil_to_tensor(Image.open(folder / row["file_name"])) for row in rows])
    return pictures, [row["caption"] for row in rows]


# Networks


def batches(count: int, size: int, images: int, seed: int) -> Iterator[Tensor]:
    """Iterate over shuffled indices [size] until `images` are seen."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(count, generator=generator).split(size):
            if len(indices) == size:
                yield indices
                images -= size
                if images <= 0:
                    return


def fit(
    module: nn.Module, loss: Callable[[Tensor], Tensor], count: int, size: int, images: int, lr: float, name: str
) -> None:
    """Train with Adam, a short warm-up and a cosine decay to zero."""
    size = min(size, count)
    steps = -(-images // size)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()),
    )
    with tqdm(total=steps * size, desc=name, unit="image", mininterval=5) as bar:
        for indices in batches(count, size, images, seed=0):
            value = loss(indices)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
            bar.update(size)
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)


def make_tokenizer(captions: list[str]):
    """Make CLIP's tokenizer with a vocabulary of these captions."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    plain = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=TOKENS)
    return plain.train_new_from_iterator(captions, vocab_size=2_000, show_progress=False)


def make_clip(tokenizer, pictures: Tensor, captions: list[str], seed: int, images: int, name: str):
    """Train a contrastive pair of encoders (Radford et al. 2021, arXiv 2103.00020) on these pictures and captions."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 3,
        "max_position_embeddings": TOKENS, "projection_dim": 64, **ends,
    }  # fmt: skip
    vision = {
        "image_size": SIDE, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "projection_dim": 64,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).train()
    tokens = tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids

    def loss(indices: Tensor) -> Tensor:
        x = pictures[indices].float() / 127.5 - 1
        return model(input_ids=tokens[indices], pixel_values=x, return_loss=True).loss

    fit(model, loss, len(pictures), 256, images, 1e-3, name)
    return model.eval()


def image_processor():
    """Return CLIP's preprocessing: SIDE pixels, from -1 to 1."""
    from transformers import CLIPImageProcessor

    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=half, image_std=half)


def make_vae(pictures: Tensor, images: int):
    """Train SDXL's autoencoder on absolute errors, with 4 x 4 pixels per latent of 16 channels (8 blur visibly)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16, norm_num_groups=8, sample_size=SIDE,
    )  # fmt: skip

    def loss(indices: Tensor) -> Tensor:
        x = pictures[indices].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        return F.l1_loss(vae.decode(posterior.sample()).sample, x) + 1e-4 * posterior.kl().mean() / x[0].numel()

    fit(vae, loss, len(pictures), 32, images, 1e-3, "vae")
    vae.eval()
    with torch.no_grad():
        some = pictures[:2_000].float() / 127.5 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in some.split(100)])
        error = torch.cat(
            [(vae.decode(z).sample - x).abs() for z, x in zip(latents.split(100), some.split(100), strict=True)]
        ).mean()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(
        f"vae: mean absolute error {error * 127.5:.2f} of 255 grey levels, scaling factor {vae.config.scaling_factor}"
    )
    return vae


def make_pipeline(tokenizer, clip, vae):
    """Make an SDXL pipeline with an untrained UNet; both text encoders are the CLIP's."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    weights = clip.state_dict()
    first, second = CLIPTextModel(clip.config.text_config), CLIPTextModelWithProjection(clip.config.text_config)
    first.load_state_dict(clip.text_model.state_dict())
    second.load_state_dict({name: weights[name] for name in second.state_dict()})
    width = clip.config.text_config.hidden_size
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), cross_attention_dim=2 * width, norm_num_groups=16,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + clip.config.projection_dim,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(  # v, as in SDXL's v-predicting fine-tunes: eps carries little information about a picture at high noise
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type="v_prediction",
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )


# What can be reached


def understood(words: str) -> tuple[str, list[str], list[str]]:
    """Parse a caption: its name, and the styles and backgrounds that it allows."""
    styles, backgrounds = list(VENDORS), list(BACKGROUNDS)
    if found := re.fullmatch(r"(.*) on an? (\w+) background", words):
        words, backgrounds = found[1], [found[2]]
    if words.split()[0] in styles:
        style, words = words.split(maxsplit=1)
        styles = [style]
    return words, styles, backgrounds


def measure_limits(out: Path, emoji: dict[tuple[str, str], Image.Image], count: int) -> dict[str, dict[str, float]]:
    """Score real pictures like `fewstep eval`, directly and through the VAE: `count` training pictures against val."""
    from diffusers import AutoencoderKL
    from torchvision.transforms.functional import pil_to_tensor

    from fewstep.evaluation.agreement import agreement, chroma, diversity
    from fewstep.evaluation.features import Clip
    from fewstep.evaluation.reference import find_reference
    from fewstep.evaluation.scores import evaluate

    judge, vae = Clip(out / "judge"), AutoencoderKL.from_pretrained(out / "vae").eval()
    reference = find_reference(str(out / "val"), judge, (3, SIDE, SIDE))
    pictures, captions = read_pictures(out / "train")
    pictures, captions = pictures[:count], captions[:count]
    rng = random.Random(0)
    different = list(dict.fromkeys(captions))
    several = []  # eight pictures that one caption allows
    for words in different[:: max(1, len(different) // 64)]:
        name, styles, backgrounds = understood(words)
        for _ in range(8):
            picture = composed(emoji[name, rng.choice(styles)], rng.choice(backgrounds), rng)
            several.append(pil_to_tensor(picture))

    @torch.no_grad()
    def through_vae(x: Tensor) -> Tensor:
        decoded = vae.decode(vae.encode(x.float() / 127.5 - 1).latent_dist.mode()).sample
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    limits = {}
    for name, seen in (("real pictures", lambda x: x), ("real pictures through the VAE", through_vae)):
        shown = [seen(part) for part in pictures.split(100)]
        fid = evaluate(shown, reference, judge, metrics=("fid",)).fid
        variants = torch.cat([judge(seen(part)) for part in torch.stack(several).split(100)]).unflatten(0, (-1, 8))
        agreed = agreement(judge, torch.cat([judge(part) for part in shown]), captions)
        spread = {"diversity": diversity(variants), "chroma": chroma(torch.cat(shown))}
        limits[name] = {"fid": fid} | agreed | spread | {"samples": len(pictures)}
        print(f"{name}: {limits[name]}")
    return limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("world"))
    parser.add_argument("--packages", type=Path, default=Path(), help="folder with the two .tgz files of `npm pack`")
    parser.add_argument("--train", type=int, default=45_000, help="training pictures")
    parser.add_argument("--val", type=int, default=10_000, help="pictures kept for evaluation")
    parser.add_argument("--clip-images", type=int, default=150_000, help="length of each CLIP's training")
    parser.add_argument("--vae-images", type=int, default=160_000, help="length of the VAE's training")
    parser.add_argument("--limits", type=int, default=5_000, help="real pictures that the judge scores at the end")
    options = parser.parse_args()
    out: Path = options.out
    packages = {style: options.packages / f"emoji-datasource-{vendor}-16.0.0.tgz" for style, vendor in VENDORS.items()}
    emoji = {}
    if not (out / "limits.json").exists():
        if missing := [file for file in packages.values() if not file.exists()]:
            parser.error(
                f"no {missing[0]}: npm pack {' '.join(f'emoji-datasource-{v}@16.0.0' for v in VENDORS.values())}"
            )
        emoji = read_emoji(packages)
        make_pictures(out, emoji, options.train, options.val)
    pictures, captions = read_pictures(out / "train")
    tokenizer = make_tokenizer(captions)
    for number, name in enumerate(("clip", "judge")):
        if not (out / name / "config.json").exists():
            clip = make_clip(tokenizer, pictures, captions, number, options.clip_images, name)
            for part in (tokenizer, image_processor(), clip):
                part.save_pretrained(out / f"{name}.part")
            (out / f"{name}.part").rename(out / name)
    if not (out / "vae" / "config.json").exists():
        make_vae(pictures, options.vae_images).save_pretrained(out / "vae.part")
        (out / "vae.part").rename(out / "vae")
    if not (out / "pipeline" / "model_index.json").exists():
        from diffusers import AutoencoderKL
        from transformers import CLIPModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
        clip, vae = CLIPModel.from_pretrained(out / "clip"), AutoencoderKL.from_pretrained(out / "vae")
        make_pipeline(tokenizer, clip, vae).save_pretrained(out / "pipeline")
    if not (out / "limits.json").exists():
        limits = measure_limits(out, emoji, options.limits)
        (out / "limits.json").write_text(json.dumps(limits, indent=2))
    print(f"{out} is there. Next: fewstep prepare {out}/pipeline --images {out}/train --out {out}/prepared")


if __name__ == "__main__":
    main()
