"""Pipelines of the diffusers library with every part of the real ones, small enough to be made by a test."""

import json
from pathlib import Path

import torch

from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.prompts import prepare_prompts
from tests.support.places import GOLDEN


def tokenizer():
    """CLIP's tokenizer with bytes for a vocabulary."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=12,
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip


def text_encoder(projected, width=8):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=16, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, scaling_factor=0.13025,
    ).eval()  # fmt: skip


def sdxl_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(json.loads((GOLDEN / "sdxl_tiny_unet.json").read_text())).eval()


def scheduler(**changes):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, **changes
    )  # fmt: skip


def tiny_clip(folder, seed=0):
    """A CLIP model with random weights, for pictures of 16 x 16."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    ends = {
        "vocab_size": 514,
        "max_position_embeddings": 12,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(
                text_config=small | ends, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=16
            )
        )
        for parameter in model.parameters():  # else all pictures look alike
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return Path(folder)


def tiny_sdxl(folder, seed=0, widths=(8, 8), **changes):
    """SDXL with everything: two text encoders, VAE (16 x 16 pixels), micro-conditions. `changes` go to the scheduler."""
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=vae(), text_encoder=text_encoder(False, widths[0]), text_encoder_2=text_encoder(True, widths[1]), tokenizer=tokenizer(),
            tokenizer_2=tokenizer(), unet=sdxl_unet(), scheduler=scheduler(**changes),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sd15(folder, seed=0, **changes):
    """Stable Diffusion 1.5 likewise."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
            cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        )  # fmt: skip
        pipeline = StableDiffusionPipeline(
            vae=vae(), text_encoder=text_encoder(False), tokenizer=tokenizer(), unet=unet, scheduler=scheduler(**changes),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return Path(folder)


def t5(width=8):
    """A T5 encoder, and a tokenizer to which every letter is a token."""
    from transformers import T5Config, T5EncoderModel

    tokens = letters()
    config = T5Config(
        vocab_size=len(tokens),
        d_model=width,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval(), tokens


def gemma():
    """SANA's text encoder, and a tokenizer likewise."""
    from transformers import Gemma2Config, Gemma2Model

    tokens = letters()
    config = Gemma2Config(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return Gemma2Model(config).eval(), tokens


def letters():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocab |= {chr(code): 3 + code for code in range(256)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=300
    )


def with_encoders(name, folder, seed=0, t5_too=True):
    """The pipeline of `tiny_transformer` with text encoders: CLIP and T5 (sd3, flux), Gemma (sana), T5 (pixart)."""
    tiny_transformer(name, folder, seed, wide=name == "sd3")
    pipeline = load(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match name:
            case "sd3":
                encoder, tokens = t5(16) if t5_too else (None, None)
                parts = {
                    "text_encoder": text_encoder(True), "tokenizer": tokenizer(), "text_encoder_2": text_encoder(True),
                    "tokenizer_2": tokenizer(), "text_encoder_3": encoder, "tokenizer_3": tokens,
                }  # fmt: skip
            case "flux":
                encoder, tokens = t5()
                parts = {
                    "text_encoder": text_encoder(False), "tokenizer": tokenizer(), "text_encoder_2": encoder,
                    "tokenizer_2": tokens,
                }  # fmt: skip
            case "sana":
                parts = dict(zip(("text_encoder", "tokenizer"), gemma(), strict=True))
            case "pixart":
                parts = dict(zip(("text_encoder", "tokenizer"), t5(), strict=True))
        for part in parts.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter.data.normal_(std=0.3)
    type(pipeline)(**{**pipeline.components, **parts}).save_pretrained(folder)
    return Path(folder)


def tiny_transformer(name, folder, seed=0, wide=False):
    """A flow or eps transformer pipeline without text encoders; returns its folder and the conditions of two prompts.

    With `wide`, SD3's network takes what two tiny CLIP encoders give.
    """
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text, pooled, mask = (
            torch.randn(2, 6, 8),
            torch.randn(2, 8),
            torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]),
        )
        none = dict.fromkeys(("text_encoder", "tokenizer"))
        pair = {**none, "text_encoder_2": None, "tokenizer_2": None}
        match name:
            case "sd3" | "sd35":  # 3.5 medium: a second attention in some blocks, normalised queries
                more = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if name == "sd35" else {}
                net = diffusers.SD3Transformer2DModel(
                    sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
                    joint_attention_dim=16 if wide else 8, caption_projection_dim=8, pooled_projection_dim=32 if wide else 8,
                    out_channels=4, pos_embed_max_size=8, **more,
                )  # fmt: skip
                pipeline = diffusers.StableDiffusion3Pipeline(
                    transformer=net, scheduler=flow(shift=3.0), vae=vae(), **pair, text_encoder_3=None, tokenizer_3=None
                )
                cond = {"text": text, "pooled": pooled}
            case "flux":
                net = diffusers.FluxTransformer2DModel(
                    patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
                    joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
                )  # fmt: skip
                pipeline = diffusers.FluxPipeline(
                    transformer=net, scheduler=flow(shift=3.0, use_dynamic_shifting=True), vae=vae(), **pair
                )
                cond = {"text": text, "pooled": pooled}
            case "sana":
                net = diffusers.SanaTransformer2DModel(
                    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=2,
                    num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
                    sample_size=16,
                )  # fmt: skip
                autoencoder = diffusers.AutoencoderDC(
                    latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
                    encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
                    decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
                    decoder_norm_types="rms_norm", decoder_act_fns="silu", downsample_block_type="Conv", upsample_block_type="interpolate",
                    scaling_factor=0.4,
                )  # fmt: skip
                pipeline = diffusers.SanaPipeline(transformer=net, scheduler=flow(shift=3.0), vae=autoencoder, **none)
                cond = {"text": text, "mask": mask}
            case "pixart":
                net = diffusers.PixArtTransformer2DModel(
                    sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=4,
                    num_attention_heads=2, cross_attention_dim=8, caption_channels=8, use_additional_conditions=False,
                )  # fmt: skip
                pipeline = diffusers.PixArtSigmaPipeline(transformer=net, scheduler=scheduler(), vae=vae(), **none)
                cond = {"text": text, "mask": mask}
        for parameter in pipeline.transformer.parameters():  # nothing is left at its initial zero
            parameter.data.normal_(std=0.2)
    pipeline.save_pretrained(folder)
    return Path(folder), cond


def load(folder):
    """A pipeline that was saved without text encoders."""
    from diffusers import DiffusionPipeline

    parts = DiffusionPipeline.load_config(folder)
    absent = [name for name, kind in parts.items() if isinstance(kind, list) and kind[0] is None]
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))


def prepared(name, root):
    """The teacher with two prompts, as its text encoders would have made them."""
    folder, cond = tiny_transformer(name, root / name)
    plain = DiffusersTeacher(path=str(folder), resolution=16 if name == "flux" else None)
    rows = {"one": 0, "two": 1}
    prepare_prompts(
        root / "prompts", ["one", "two"], lambda texts: {k: v[[rows[t] for t in texts]] for k, v in cond.items()},
        {k: torch.zeros_like(v[0]) for k, v in cond.items()}, {"encoders": plain.encoders_fingerprint()}, torch.float32,
    )  # fmt: skip
    return plain.model_copy(update={"prompts": root / "prompts"}), cond
