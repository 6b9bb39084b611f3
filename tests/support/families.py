"""Pipelines of the text-to-image families of 2025 and 2026 with every part of the real ones, text encoders included."""

from pathlib import Path

import torch

from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import gemma, letters, t5

NAMES = ("flux2", "flux2-dev", "z-image", "qwen-image", "krea2", "lumina2", "chroma", "longcat")
PACKED = ("qwen-image", "krea2", "chroma", "longcat")  # whose samplers see tokens of 2 x 2 latents


class Made(dict):
    """What is made of a name when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


def chat():
    """A tokenizer to which every letter is a token, with a template for conversations."""
    tokens = letters()
    tokens.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}{% if enable_thinking is false %}<>{% endif %}"
    )
    return tokens


def qwen3(layers, whole=True):
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=259, hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4,
    )  # fmt: skip
    return (Qwen3ForCausalLM if whole else Qwen3Model)(config)


def mistral():
    """The encoder of FLUX.2-dev, of which three layers are read, and the processor of text and pictures that it calls tokenizer."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    tokens = letters()
    tokens.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    template = (
        "{% for message in messages %}[{{ message.role[0] }}]"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    text = {
        "model_type": "mistral",
        "vocab_size": 262,
        "num_hidden_layers": 30,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    sight = {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = Mistral3Config(text_config=small | text, vision_config=small | sight, image_token_index=259)
    reader = PixtralProcessor(PixtralImageProcessor(), tokens, chat_template=template)
    return Mistral3ForConditionalGeneration(config), reader


def qwen_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        )
    )  # fmt: skip


def processor():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokens = chat()
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor(), chat_template=tokens.chat_template
    )


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLModel

    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config={
                "vocab_size": 262, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
        )
    )  # fmt: skip


def marked():
    """A tokenizer without an end, to which the marks of a conversation are tokens: five make Krea 2's suffix."""
    from tokenizers import processors

    tokens = letters()
    tokens.add_tokens(["<|im_start|>", "<|im_end|>", "assistant"], special_tokens=True)
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokens


def qwen_vae():
    import diffusers

    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[-0.7, 0.3, 0.1, 0.9],
        latents_std=[2.8, 1.4, 2.3, 0.7],
    )  # fmt: skip


def kl(levels=2, kind="AutoencoderKL", **more):
    import diffusers

    return getattr(diffusers, kind)(
        block_out_channels=(4,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=2, layers_per_block=1, **more,
    )  # fmt: skip


def parts(name):
    """Components of the pipeline, and its class."""
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler
    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    scaled = {"scaling_factor": 0.36, "shift_factor": 0.12}
    match name:
        case "flux2" | "flux2-dev":
            klein = name == "flux2"
            net = diffusers.Flux2Transformer2DModel(
                in_channels=16, num_single_layers=2, joint_attention_dim=24, timestep_guidance_channels=16, guidance_embeds=not klein,
                axes_dims_rope=(2, 2, 2, 2), **heads,
            )  # fmt: skip
            vae = kl(kind="AutoencoderKLFlux2")
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2)
            encoder, tokens = (qwen3(28), chat()) if klein else mistral()
            found = {"vae": vae, "text_encoder": encoder, "tokenizer": tokens, "transformer": net}
            kind = diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline
            return kind, found | {"scheduler": flow(use_dynamic_shifting=True)}
        case "z-image":
            net = diffusers.ZImageTransformer2DModel(
                in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[2, 2, 4],
                axes_lens=[1024, 32, 32],
            )  # fmt: skip
            found = {"vae": kl(**scaled), "text_encoder": qwen3(3, whole=False), "tokenizer": chat()}
            return diffusers.ZImagePipeline, found | {"transformer": net, "scheduler": flow(shift=6.0)}
        case "krea2":
            net = diffusers.Krea2Transformer2DModel(
                in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
                timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
                text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4),
            )  # fmt: skip
            dynamic = flow(use_dynamic_shifting=True, max_image_seq_len=6400)
            found = {
                "vae": qwen_vae(),
                "text_encoder": qwen3_vl(),
                "tokenizer": marked(),
                "text_encoder_select_layers": (1, 2),
            }
            return diffusers.Krea2Pipeline, found | {"transformer": net, "scheduler": dynamic}
        case "qwen-image":
            net = diffusers.QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(2, 2, 4), **heads
            )
            found = {"vae": qwen_vae(), "text_encoder": qwen_vl(), "tokenizer": chat()}
            dynamic = flow(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=None
            )
            return diffusers.QwenImagePipeline, found | {"transformer": net, "scheduler": dynamic}
        case "lumina2":
            net = diffusers.Lumina2Transformer2DModel(
                sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
                multiple_of=8, axes_dim_rope=(2, 2, 4), axes_lens=(300, 32, 32), cap_feat_dim=8,
            )  # fmt: skip
            encoder, tokens = gemma()
            found = {"vae": kl(4, **scaled), "text_encoder": encoder, "tokenizer": tokens}
            return diffusers.Lumina2Pipeline, found | {"transformer": net, "scheduler": flow(shift=6.0)}
        case "longcat":
            net = diffusers.LongCatImageTransformer2DModel(
                in_channels=16,
                num_single_layers=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=[2, 2, 4],
                **heads,
            )
            found = {"vae": kl(**scaled), "text_encoder": qwen_vl(), "tokenizer": chat(), "text_processor": processor()}
            dynamic = flow(use_dynamic_shifting=True)
            return diffusers.LongCatImagePipeline, found | {"transformer": net, "scheduler": dynamic}
        case "chroma":
            net = diffusers.ChromaTransformer2DModel(
                in_channels=16, num_single_layers=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4), approximator_num_channels=32,
                approximator_hidden_dim=16, approximator_layers=1, **heads,
            )  # fmt: skip
            encoder, tokens = t5()
            found = {"vae": kl(**scaled), "text_encoder": encoder, "tokenizer": tokens}
            return diffusers.ChromaPipeline, found | {"transformer": net, "scheduler": flow(shift=1.0)}


def tiny_family(name, folder, seed=0):
    """The pipeline of a family, all of its weights drawn; for pictures of 16 x 16 pixels (Lumina 2: 64 x 64)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind, components = parts(name)
        for part in ("transformer", "text_encoder"):
            for parameter in components[part].parameters():  # nothing is left at its initial zero or one
                parameter.data.normal_(std=0.2)
    kind(**components).save_pretrained(folder)
    return Path(folder)


def side(name):
    """Pixels of its picture."""
    return 64 if name == "lumina2" else 16


def laid(name, samples):
    """Samples of fewstep's denoiser as the pipeline's sampler has them."""
    if name.startswith("flux2"):
        return samples.flatten(2).mT
    if name not in PACKED:
        return samples
    count, channels, height, width = samples.shape
    cells = samples.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, height * width // 4, channels * 4)


def unlaid(name, tokens, shape):
    """The inverse of `laid`."""
    order = laid(name, torch.arange(tokens.numel()).reshape(shape)).flatten()
    return torch.empty(tokens.numel()).scatter(0, order, tokens.flatten()).reshape(shape)


def prepared_family(name, root):
    """The teacher of a pipeline in a folder of `root`, with two prompts in `prompts` there."""
    spec = DiffusersTeacher(path=str(tiny_family(name, root / name)), resolution=side(name))
    spec.prepare(["one", "two"], root / "prompts", spec.encoder(), torch.float32)
    return spec.model_copy(update={"prompts": root / "prompts"})
