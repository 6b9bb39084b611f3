"""Rules by which other programs read our files, as data: names, strengths, times. Read on 2026-11-27 from

* ComfyUI (github.com/Comfy-Org/ComfyUI): comfy/lora.py `load_lora`, `model_lora_keys_unet`; comfy/weight_adapter/lora.py;
  comfy/utils.py `flux_to_diffusers`, `mmdit_to_diffusers`, `z_image_to_diffusers`; nodes.py; comfy_extras/nodes_model_advanced.py, nodes_flux.py,
  nodes_sd3.py; comfy/samplers.py `simple_scheduler`; comfy/model_sampling.py.
* kohya's sd-scripts (github.com/kohya-ss/sd-scripts): networks/sdxl_merge_lora.py `merge_to_sd_model`, networks/lora.py
  (targets), library/sdxl_original_unet.py (names of the modules).
"""

import math

import torch

# ComfyUI: what may stand before a layer's name under diffusers' names; {0} is the path, {1} the path with underscores
COMFYUI_PREFIXES = {
    "SD3Transformer2DModel": ("transformer.{0}", "base_model.model.{0}", "lora_transformer_{1}", "lycoris_{1}"),
    "FluxTransformer2DModel": ("transformer.{0}", "{0}", "lora_transformer_{1}", "lycoris_{1}"),
    "PixArtTransformer2DModel": ("transformer.{0}", "base_model.model.{0}", "unet.base_model.model.{0}"),
    "UNet2DConditionModel": ("lora_unet_{1}", "lycoris_{1}"),
    # Flux2, Chroma and LongCatImage are subclasses of Flux there (comfy/model_base.py); Z-Image is its Lumina2, whose branch is `z_image_to_diffusers`
    "Flux2Transformer2DModel": ("transformer.{0}", "{0}", "lora_transformer_{1}", "lycoris_{1}"),
    "ChromaTransformer2DModel": ("transformer.{0}", "{0}", "lora_transformer_{1}", "lycoris_{1}"),
    "LongCatImageTransformer2DModel": ("transformer.{0}", "{0}", "lora_transformer_{1}", "lycoris_{1}"),
    "ZImageTransformer2DModel": ("transformer.{0}", "diffusion_model.{0}", "{0}", "lycoris_{1}"),
    "QwenImageTransformer2DModel": ("transformer.{0}", "{0}", "lycoris_{1}"),
    # `krea2_to_diffusers`, as two programs that write for it list it; its own text was not at hand
    "Krea2Transformer2DModel": ("transformer.{0}", "diffusion_model.{0}", "{0}", "lycoris_{1}"),
}
_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0",
    "attn.to_add_out",
)  # fmt: skip
_KREA2 = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0", "ff.gate", "ff.up", "ff.down",
)  # fmt: skip
_Z_IMAGE = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2",
    "feed_forward.w3", "adaLN_modulation.0",
)  # fmt: skip
# ComfyUI: layers of a block that have a place in its own network
COMFYUI_LAYERS = {
    "SD3Transformer2DModel": {
        "transformer_blocks": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0",
            "attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "norm1.linear",
            "norm1_context.linear", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        ),
        "": ("proj_out", "norm_out.linear", "context_embedder", "pos_embed.proj"),
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0",
            "attn.to_add_out", "norm1.linear", "norm1_context.linear", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        "single_transformer_blocks": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "norm.linear", "proj_out"),
        "": ("proj_out", "norm_out.linear", "x_embedder", "context_embedder"),
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks": (
            *_ATTENTION, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
        ),
        "single_transformer_blocks": ("attn.to_qkv_mlp_proj", "attn.to_out"),
        "": ("proj_out", "x_embedder", "context_embedder"),
    },
    "ZImageTransformer2DModel": {
        "layers": _Z_IMAGE, "noise_refiner": _Z_IMAGE, "context_refiner": _Z_IMAGE[:-1],
        "": ("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
    },
    # its own network has diffusers' names (comfy/ldm/qwen_image/model.py)
    "QwenImageTransformer2DModel": {
        "transformer_blocks": (
            *_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1",
        ),
        "": ("img_in", "txt_in", "proj_out", "norm_out.linear"),
    },
}  # fmt: skip
COMFYUI_LAYERS["Krea2Transformer2DModel"] = {
    "transformer_blocks": _KREA2,
    "text_fusion": tuple(f"{number}.{layer}" for number in range(2) for layer in _KREA2),
    "": (),
}
COMFYUI_LAYERS |= dict.fromkeys(
    ("ChromaTransformer2DModel", "LongCatImageTransformer2DModel"), COMFYUI_LAYERS["FluxTransformer2DModel"]
)
# ComfyUI: the matrices of a layer, the first form that is there
COMFYUI_PARTS = (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"))
# ComfyUI: inputs that a node must have
COMFYUI_NODES = {
    "CheckpointLoaderSimple": {"ckpt_name"}, "UNETLoader": {"unet_name", "weight_dtype"}, "VAELoader": {"vae_name"},
    "DualCLIPLoader": {"clip_name1", "clip_name2", "type"}, "TripleCLIPLoader": {"clip_name1", "clip_name2", "clip_name3"},
    "LoraLoaderModelOnly": {"model", "lora_name", "strength_model"}, "CLIPTextEncode": {"clip", "text"},
    "CLIPSetLastLayer": {"clip", "stop_at_clip_layer"}, "FluxGuidance": {"conditioning", "guidance"},
    "EmptyLatentImage": {"width", "height", "batch_size"}, "EmptySD3LatentImage": {"width", "height", "batch_size"},
    "ModelSamplingDiscrete": {"model", "sampling", "zsnr"}, "ModelSamplingSD3": {"model", "shift"},
    "ModelSamplingFlux": {"model", "max_shift", "base_shift", "width", "height"},
    "KSampler": {
        "model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise",
    },
    "VAEDecode": {"samples", "vae"}, "SaveImage": {"images", "filename_prefix"},
}  # fmt: skip
# kohya, SDXL: modules of its own UNet whose linear layers and convolutions a LoRA may change, by pattern
KOHYA_SDXL = (
    r"(input_blocks_[1-8]|output_blocks_[0-8]|middle_block)_\d_(in_layers_2|emb_layers_1|out_layers_3|skip_connection)",
    r"input_blocks_[1-8]_0_op", r"output_blocks_[0-8]_[12]_conv",
    r"(input_blocks_[1-8]|output_blocks_[0-8]|middle_block)_1_(proj_in|proj_out)",
    r"(input_blocks_[1-8]|output_blocks_[0-8]|middle_block)_1_transformer_blocks_\d_attn[12]_(to_q|to_k|to_v|to_out_0)",
    r"(input_blocks_[1-8]|output_blocks_[0-8]|middle_block)_1_transformer_blocks_\d_ff_net_(0_proj|2)",
)  # fmt: skip


def comfyui_changes(tensors, model, paths):
    """What ComfyUI adds to each layer: alpha / rank B A where there is a tensor `.alpha`, else B A; and the keys it used."""
    changes, used = {}, set()
    for path in paths:
        for name in (form.format(path, path.replace(".", "_")) for form in COMFYUI_PREFIXES[model]):
            for up, down in COMFYUI_PARTS:
                if f"{name}.{up}" in tensors:
                    b, a = tensors[f"{name}.{up}"].float(), tensors[f"{name}.{down}"].float()
                    alpha = tensors.get(f"{name}.alpha")
                    scale = 1.0 if alpha is None else alpha.item() / len(a)
                    changes[path] = scale * (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])
                    used |= {f"{name}.{up}", f"{name}.{down}"} | ({f"{name}.alpha"} if alpha is not None else set())
    return changes, used


def comfyui_has_place(model, path):
    """Whether ComfyUI's own network has a layer of this diffusers name."""
    block, _, rest = path.partition(".")
    tables = COMFYUI_LAYERS[model]
    if block in tables:
        return rest.partition(".")[2] in tables[block]
    return path in tables[""]


def comfyui_simple(nodes, steps):
    """Noise levels u that the scheduler `simple` picks under the workflow's node of a flow's shift."""
    node = next(node for node in nodes.values() if node["class_type"] in ("ModelSamplingSD3", "ModelSamplingFlux"))
    inputs = node["inputs"]
    if node["class_type"] == "ModelSamplingSD3":
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        table = inputs["shift"] * t / (1 + (inputs["shift"] - 1) * t)
    else:
        slope = (inputs["max_shift"] - inputs["base_shift"]) / (4096 - 256)
        mu = inputs["width"] * inputs["height"] / 256 * slope + inputs["base_shift"] - slope * 256
        t = torch.arange(1, 10001, dtype=torch.float64) / 10000
        table = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    return [table[-(1 + int(step * len(table) / steps))].item() for step in range(steps)]
