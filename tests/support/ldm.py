"""A pipeline of the diffusers library as one .safetensors file in the form of the original programs, as fine-tunes are shared."""

from pathlib import Path

import torch
from safetensors.torch import save_file

# configurations of the full-size UNets
SDXL = dict(
    sample_size=128, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
    layers_per_block=2, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, transformer_layers_per_block=(1, 2, 10),
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SD15 = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=768, attention_head_dim=8,
)  # fmt: skip

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def _moved(state, old, new, names=None):
    """Entries under `old.` as entries under `new.`, their first parts renamed."""
    found = {}
    for key, value in state.items():
        if key.startswith(f"{old}."):
            first, _, rest = key.removeprefix(f"{old}.").partition(".")
            found[f"{new}.{(names or {}).get(first, first)}.{rest}".rstrip(".")] = value
    return found


def unet_keys(unet):
    """Stable Diffusion's and SDXL's UNet."""
    state, config = unet.state_dict(), unet.config
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    linears = {"linear_1": "0", "linear_2": "2"}
    found = _moved(state, "time_embedding", "time_embed", linears) | _moved(
        state, "add_embedding", "label_emb.0", linears
    )
    found |= _moved(state, "conv_in", "input_blocks.0.0") | _moved(state, "conv_norm_out", "out.0")
    found |= _moved(state, "conv_out", "out.2")
    for level in range(levels):
        for layer in range(layers):
            there = f"input_blocks.{1 + level * (layers + 1) + layer}"
            found |= _moved(state, f"down_blocks.{level}.resnets.{layer}", f"{there}.0", RESNET)
            found |= _moved(state, f"down_blocks.{level}.attentions.{layer}", f"{there}.1")
        found |= _moved(
            state, f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        )
        for layer in range(layers + 1):
            there = f"output_blocks.{level * (layers + 1) + layer}"
            found |= _moved(state, f"up_blocks.{level}.resnets.{layer}", f"{there}.0", RESNET)
            found |= _moved(state, f"up_blocks.{level}.attentions.{layer}", f"{there}.1")
        slot = 2 if any(key.startswith(f"up_blocks.{level}.attentions") for key in state) else 1
        found |= _moved(state, f"up_blocks.{level}.upsamplers.0.conv", f"{there}.{slot}.conv")
    for old, new in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
        found |= _moved(state, f"mid_block.{old}", f"middle_block.{new}", RESNET if "resnets" in old else None)
    return {f"model.diffusion_model.{key}": value for key, value in found.items()}


def vae_keys(vae):
    """The autoencoder."""
    state, levels = vae.state_dict(), len(vae.config.block_out_channels)
    resnet = {"conv_shortcut": "nin_shortcut"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    found = _moved(state, "quant_conv", "quant_conv") | _moved(state, "post_quant_conv", "post_quant_conv")
    for side, blocks, name, resize in (
        ("encoder", "down_blocks", "down", "downsample"),
        ("decoder", "up_blocks", "up", "upsample"),
    ):
        for old, new in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            found |= _moved(state, f"{side}.{old}", f"{side}.{new}")
        for level in range(levels):
            there = level if side == "encoder" else levels - 1 - level
            for layer in range(3):
                found |= _moved(
                    state, f"{side}.{blocks}.{level}.resnets.{layer}", f"{side}.{name}.{there}.block.{layer}", resnet
                )
            found |= _moved(state, f"{side}.{blocks}.{level}.{resize}rs.0.conv", f"{side}.{name}.{there}.{resize}.conv")
        found |= _moved(state, f"{side}.mid_block.resnets.0", f"{side}.mid.block_1", resnet)
        found |= _moved(state, f"{side}.mid_block.resnets.1", f"{side}.mid.block_2", resnet)
        for key, value in _moved(state, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", attention).items():
            key = key.replace("proj_out.0", "proj_out")
            found[key] = value[..., None, None] if value.ndim == 2 else value  # linear layers were convolutions once
    return {f"first_stage_model.{key}": value for key, value in found.items()}


def open_clip_keys(encoder):
    """SDXL's second text encoder, as OpenCLIP has it."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    names = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    for layer in range(encoder.config.num_hidden_layers):
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for here, there in names.items():
            found |= {f"{new}.{there}.{part}": state[f"{old}.{here}.{part}"] for part in ("weight", "bias")}
        for part in ("weight", "bias"):
            found[f"{new}.attn.in_proj_{part}"] = torch.cat([state[f"{old}.self_attn.{q}_proj.{part}"] for q in "qkv"])
    return {f"conditioner.embedders.1.model.{key}": value for key, value in found.items()}


def clip_keys(encoder, prefix):
    """OpenAI's text encoder."""
    return {
        f"{prefix}.text_model.{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()
    }


def single_file(pipeline, path: Path) -> Path:
    """Write a whole Stable Diffusion 1.5 or SDXL pipeline."""
    state = unet_keys(pipeline.unet) | vae_keys(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        state |= clip_keys(pipeline.text_encoder, "conditioner.embedders.0.transformer") | open_clip_keys(
            pipeline.text_encoder_2
        )
    else:
        state |= clip_keys(pipeline.text_encoder, "cond_stage_model.transformer")
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path
