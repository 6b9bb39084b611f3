"""How far an adapter without an entry would carry: what one call of a pipeline shows of how it calls its network.

    python tools/generic_adapter.py [FAMILY ...]

Runs the tiny pipelines of the tests unguided, with spies on network and scheduler, at two times, with two noises and two
prompts. Arguments of the network are sorted by what changes them: the sample (equal to the sampler's latents but for the
shape), the time (an affine function of the noise level), conditions (of the prompt), constants. Then the network is called
with these rules at a third time and noise, and compared with the pipeline. Prints a line a family: the rules, whether the
replay equals the pipeline, and whether a prompt has the same conditions in a batch of others.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.families import NAMES, side, tiny_family
from tests.support.pipelines import letters, with_encoders

FIRST = ("sd3", "flux", "sana", "pixart")
OFF: dict[str, dict[str, Any]] = {  # what switches guidance off is each pipeline's own
    "qwen-image": {"true_cfg_scale": 1.0}, "longcat": {"enable_prompt_rewrite": False},
    "z-image": {"guidance_scale": 0.0}, "krea2": {"guidance_scale": 0.0},
}  # fmt: skip
P, Q = "a cat", "two dogs in a house"
TIMES = {"1000 s": lambda s: 1000 * s, "s": lambda s: s, "1 - s": lambda s: 1 - s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*FIRST, *NAMES, "auraflow"])
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            make = with_encoders if name in FIRST else tiny_family if name in NAMES else unknown
            made = make(name, Path(folder))
            said = studied(name, made)
        print(f"{name} | {said}", flush=True)


def unknown(name: str, folder: Path) -> Path:
    """AuraFlow, which has no entry."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=259, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    for part in (network, encoder):
        for parameter in part.parameters():
            parameter.data.normal_(std=0.2)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2, **levels)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    diffusers.AuraFlowPipeline(letters(), encoder, vae, network, flow).save_pretrained(folder)
    return folder


def flat(value: Any) -> Tensor:
    """Numbers of a tensor, or of a list of tensors."""
    return value.flatten() if isinstance(value, Tensor) else torch.cat([flat(part) for part in value])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one.float(), other.float(), atol=1e-6)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def called(name: str, pipeline: Any, prompts: list[str], seed: int, sigma: float) -> dict[str, Any]:
    """Arguments and output of the network, and the scheduler's, in the first step of a call from noise of that seed."""
    calls: list[tuple[dict[str, Any], Any]] = []
    steps: list[tuple[Any, ...]] = []
    network, step = pipeline.transformer, pipeline.scheduler.step

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        calls.append(({key: value for key, value in bound.items() if key != "self"}, output[0]))

    def spied(*args: Any, **kwargs: Any) -> Any:
        steps.append(args)
        return step(*args, **kwargs)

    handle, pipeline.scheduler.step = network.register_forward_hook(hook, with_kwargs=True), spied
    size = side(name) if name in NAMES else 32 if name == "sana" else 16
    more = {"use_resolution_binning": False} if name in ("sana", "pixart") else {}
    more |= {} if name == "pixart" else {"sigmas": [sigma, 0.1]}
    if name == "longcat":  # whose call draws 16 channels for every VAE
        more["latents"] = torch.randn(len(prompts), 16, 16, generator=torch.Generator().manual_seed(seed))
    try:
        pipeline(
            prompt=prompts, num_inference_steps=2, height=size, width=size, output_type="latent",
            generator=torch.Generator().manual_seed(seed), **({"guidance_scale": 1.0} | more | OFF.get(name, {})),
        )  # fmt: skip
    finally:
        handle.remove()
        pipeline.scheduler.step = step
    output, time, sample = steps[0][:3]
    level = pipeline.scheduler.sigmas[0].item() if hasattr(pipeline.scheduler, "sigmas") else float(time)
    return {"given": calls[0][0], "output": calls[0][1], "step": output, "sample": sample, "level": level}


def studied(name: str, folder: Path) -> str:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    a = called(name, pipeline, [P], 0, 1.0)
    b, c = called(name, pipeline, [P], 1, 0.7), called(name, pipeline, [Q], 0, 1.0)
    rules: dict[str, str] = {}
    for key, value in a["given"].items():
        rules[key] = "constant"
        if not (isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor))):
            continue
        if not same(value, c["given"][key]):
            rules[key] = "condition"
        elif not same(value, b["given"][key]):
            rules[key] = "unknown"
            pairs = [(flat(x["given"][key]), x["sample"].flatten()) for x in (a, b)]
            if all(one.numel() == other.numel() and torch.allclose(one, other, atol=1e-5) for one, other in pairs):
                rules[key] = "sample"
            for words, rule in TIMES.items():
                if all(abs(flat(x["given"][key])[0].item() - rule(x["level"])) < 1e-3 for x in (a, b)):
                    rules[key] = f"time {words}"
    sign = next((s for s in (1, -1) if all(_signed(x, s) for x in (a, b))), None)
    found = ", ".join(f"{key}: {rule}" for key, rule in rules.items() if rule != "constant")
    if "unknown" in rules.values() or sign is None or not any(rule.startswith("time") for rule in rules.values()):
        return f"{found}, sign {sign} | not captured"
    wanted = called(name, pipeline, [P], 2, 0.4)
    given = dict(a["given"])
    for key, rule in rules.items():
        if rule == "sample":
            given[key] = _like(a["given"][key], wanted["sample"])
        elif rule.startswith("time"):
            value = TIMES[rule.removeprefix("time ")](wanted["level"])
            given[key] = torch.full_like(a["given"][key], value)
    with torch.no_grad():
        output = flat(pipeline.transformer(**given)[0])
    equal = torch.allclose(output, flat(wanted["output"]), atol=1e-4)
    both = called(name, pipeline, [P, Q], 0, 1.0)["given"]
    conditions = [key for key, rule in rules.items() if rule == "condition"]
    alone = all(same(both[key][:1], a["given"][key]) for key in conditions)
    return f"{found}, sign {sign} | {'equal' if equal else 'differs'} | {'the same in a batch' if alone else 'others in a batch'}"


def _signed(call: dict[str, Any], sign: int) -> bool:
    one, other = flat(call["output"]), flat(call["step"])
    return one.numel() == other.numel() and torch.allclose(sign * one, other.to(one.dtype), atol=1e-5)


def _like(value: Any, sample: Tensor) -> Any:
    if isinstance(value, Tensor):
        return sample.reshape(value.shape).to(value.dtype)
    return [part.reshape(old.shape) for part, old in zip(sample, value, strict=True)]


if __name__ == "__main__":
    main()
