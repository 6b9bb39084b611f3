"""Run an exported student in the programs that read it, and compare with `fewstep sample`.

    python tools/clients.py RUN EXPORT [RUN EXPORT ...] [--base FILE] [--sd-scripts FOLDER] [--comfyui FOLDER] [--json FILE]

For every file: the program, keys that it did not use, the times at which it called the network, and the largest
difference of a pixel (of a weight, for merges) from fewstep's, from the same noise. diffusers is run as the model card
says, every snippet as it is printed. ComfyUI is started without its window and given the export's workflow; it does not
say at which times it calls a network. What a machine does not have is "not run".
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.formats.model import read_header

PROMPT, SEED = "a prompt", 7  # the prompt is the card's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", type=Path, help="a run folder or student's file, and its export; again")
    parser.add_argument("--sd-scripts", type=Path, help="folder of kohya's sd-scripts")
    parser.add_argument("--comfyui", type=Path, help="folder of ComfyUI, whose requirements this Python has")
    parser.add_argument("--base", type=Path, help="the base model as one file, for sd-scripts and ComfyUI")
    parser.add_argument("--json", type=Path, help="write the table there too")
    given = parser.parse_args()
    if len(given.pairs) % 2:
        parser.error("give a run and its export, in turn")
    rows = []
    for run, export in zip(given.pairs[::2], given.pairs[1::2], strict=True):
        rows += of_diffusers(run, export)
        rows += of_kohya(export, given.sd_scripts, given.base)
        rows += of_lycoris(run, export)
        rows += of_comfyui(run, export, given.comfyui, given.base)
    print("file | program | keys not used | times visited | error")
    for one in rows:
        print(" | ".join(str(one[name]) for name in ("file", "program", "unused", "times", "error")), one["note"])
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))


def row(file: Path, program: str, unused: object = "", times: object = "", error: object = "", note: str = "") -> dict:
    return {"file": str(file), "program": program, "unused": unused, "times": times, "error": error, "note": note}


# -- diffusers -----------------------------------------------------------------------------------------------------------


class Unused(logging.Handler):
    """Counts what diffusers and peft say of keys that they did not use."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if re.search("unexpected keys|not used|missing keys", text, re.IGNORECASE):
            self.said.append(text)


def of_diffusers(run: Path, export: Path) -> list[dict]:
    """Run every snippet of the card."""
    from fewstep.students.student import find_student, load_student

    file = find_student(run)
    assert file is not None, f"{run} holds no student"
    settings = load_student(file).pipeline
    named = {
        "THIS_FOLDER": export,
        "BASE_MODEL": settings.path,
        "BASE_CONFIG": settings.config,
        "BASE_LORA": settings.lora,
    }
    card = (export / "README.md").read_text(encoding="utf-8")
    rows = []
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        for placeholder, place in named.items():
            code = code.replace(placeholder, str(place))
        *before, last = code.strip().splitlines()
        heard, names = Unused(), {}
        logging.getLogger("diffusers").addHandler(heard)
        exec("\n".join(before), names)
        pipeline = names["pipeline"]
        network = getattr(pipeline, "unet", None) or pipeline.transformer
        visited: list[float] = []
        network.register_forward_pre_hook(
            lambda _, args, kw, seen=visited: seen.append(_time(args, kw)), with_kwargs=True
        )
        pipeline.set_progress_bar_config(disable=True)
        _keep_numbers(pipeline.image_processor)
        torch.manual_seed(SEED)
        exec(last, names)
        logging.getLogger("diffusers").removeHandler(heard)
        wanted, times = ours(file, network, _drawn(file, network))
        error = (names["image"] - wanted).abs().max().item()
        which = export / ("lora" if "load_lora_weights" in code else "model_index.json")
        rows.append(row(which, "diffusers", len(heard.said), visited, round(error, 7)))
        rows[-1] |= {"wanted": times, "contrast": round(wanted.std().item(), 4)}
    return rows


def _time(args: tuple, kwargs: dict) -> float:
    value = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return round(torch.as_tensor(value).flatten()[0].item(), 4)


def _keep_numbers(processor: Any) -> None:
    """Have a pipeline return pictures as numbers from 0 to 1 instead of bytes, whose rounding hides small differences."""
    postprocess = processor.postprocess
    processor.postprocess = lambda image, output_type="pil", **more: postprocess(image, output_type="pt", **more)


def _pixels(image: object) -> Tensor:
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image)


def _drawn(file: Path, network: torch.nn.Module) -> list[Tensor]:
    """The noise that a pipeline draws for each call."""
    header = read_header(file)
    torch.manual_seed(SEED)
    shape = header.denoiser.net.sample_shape
    return [_noise(shape, packed=step > 0 and _packs(network)) for step in range(len(header.times))]


@torch.no_grad()
def ours(file: Path, network: Any, noise: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """fewstep's picture of that noise, and the times that the network is told."""
    from fewstep.evaluation.candidates import encode_prompts
    from fewstep.students import sample
    from fewstep.students.student import load_student

    student = load_student(file, prompts=encode_prompts(str(file), [PROMPT], torch.device("cpu")))
    drawn, sample.noise_of = sample.noise_of, lambda seeds, shape, step=0: noise[step]
    try:
        sampler = sample.FewStep(student.generator, student.codec)
        labels = torch.tensor([0])
        made = sample.generate(sampler, [0], student.shape, student.conditioner, labels=labels, uint8=False)
        picture = (next(iter(made))[0] / 2 + 0.5).clamp(0, 1)
    finally:
        sample.noise_of = drawn
    schedule = student.generator.denoiser.schedule
    labels = schedule.label(torch.tensor(student.generator.times, dtype=torch.float64))
    scale = getattr(network.config, "timestep_scale", 1.0) if "Sana" in type(network).__name__ else 1.0
    scale = 0.001 if _packs(network) else scale
    return picture, [round(label * scale, 4) for label in labels.tolist()]


def _packs(network: torch.nn.Module) -> bool:
    """FLUX's sampler sees tokens of 2 x 2 latents, and draws its fresh noise in their order."""
    return type(network).__name__ == "FluxTransformer2DModel"


def _noise(shape: tuple[int, ...], packed: bool) -> Tensor:
    if not packed:
        return torch.randn(1, *shape)
    channels, height, width = shape
    tokens = torch.randn(1, height * width // 4, channels * 4)
    tokens = tokens.view(1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(1, *shape)


# -- kohya's scripts -----------------------------------------------------------------------------------------------------


def of_kohya(export: Path, scripts: Path | None, base: Path | None) -> list[dict]:
    """Merge the LoRA with sd-scripts and compare with the checkpoint of `--formats checkpoint`."""
    from safetensors.torch import load_file

    rows = []
    for file in sorted((export / "lora").glob("*_lora.safetensors")):
        whole = export / f"{file.name.removesuffix('_lora.safetensors')}.safetensors"
        if scripts is None or base is None or not whole.exists():
            rows.append(row(file, "sd-scripts", note="not run"))
            continue
        sdxl = any("input_blocks" in key for key in load_file(file))
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "merged.safetensors"
            script = scripts / "networks" / ("sdxl_merge_lora.py" if sdxl else "merge_lora.py")
            command = [sys.executable, str(script), "--sd_model", str(base), "--models", str(file), "--ratios", "1.0"]
            command += ["--save_to", str(merged), "--precision", "float", "--save_precision", "float"]
            done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append(row(file, "sd-scripts", note=done.stderr.strip().splitlines()[-1]))
                continue
            found, wanted = load_file(merged), load_file(whole)
        unused = done.stderr.count("no module found for LoRA weight") + done.stdout.count("no module found for LoRA")
        common = [key for key in wanted if key in found and key.startswith("model.diffusion_model.")]
        error = max((found[key].float() - wanted[key].float()).abs().max().item() for key in common)
        rows.append(row(file, "sd-scripts", unused, "", round(error, 6)))
    return rows


# -- LyCORIS -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def of_lycoris(run: Path, export: Path) -> list[dict]:
    """Merge kohya's file by LyCORIS' own reader of that form (`pip install lycoris-lora einops toml`), into diffusers' UNet."""
    from safetensors import safe_open

    from fewstep.networks.lora import merged
    from fewstep.students.student import find_student, load_student

    rows = []
    for file in sorted((export / "lora").glob("*_lora.safetensors")):
        with safe_open(file, "pt") as opened:
            layers = {key.partition(".")[0] for key in opened.keys()}  # noqa: SIM118  (no mapping)
        if importlib.util.find_spec("lycoris") is None:
            rows.append(row(file, "LyCORIS", note="not run"))
            continue
        if any("input_blocks" in layer for layer in layers):
            rows.append(
                row(file, "LyCORIS", note="not run: SDXL's names are those of kohya's own UNet, which is not here")
            )
            continue
        from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

        LycorisNetworkKohya.UNET_TARGET_REPLACE_NAME = []  # it would make some modules twice, and drops all of them again
        student = find_student(run)
        assert student is not None, f"{run} holds no student"
        adapted: Any = load_student(student).generator.denoiser
        wanted = {key.removeprefix("net.model."): value.clone() for key, value in merged(adapted).items()}
        unet = adapted.base.net.model
        network, weights = create_network_from_weights(1.0, str(file), None, None, unet)
        network.merge_to(None, unet, weights, torch.float32, "cpu")
        error = max((value - wanted[key]).abs().max().item() for key, value in unet.state_dict().items())
        rows.append(row(file, "LyCORIS", len(layers) - len(network.unet_loras), "", round(error, 6)))
    return rows


# -- ComfyUI -------------------------------------------------------------------------------------------------------------


def of_comfyui(run: Path, export: Path, program: Path | None, base: Path | None) -> list[dict]:
    """Send the export's workflow to a ComfyUI of our own, on the CPU."""
    from fewstep.students.student import find_student, load_student

    rows = []
    for file in sorted(export.glob("*_comfyui.json")):
        if program is None or base is None:
            rows.append(row(file, "ComfyUI", note="not run"))
            continue
        nodes = json.loads(file.read_text(encoding="utf-8"))
        for node in nodes.values():
            inputs = node["inputs"]
            inputs |= {"seed": SEED} if "seed" in inputs else {}
            inputs |= {"ckpt_name": base.name} if "ckpt_name" in inputs else {}
        nodes["3"]["inputs"]["text"] = PROMPT
        student = find_student(run)
        assert student is not None, f"{run} holds no student"
        with tempfile.TemporaryDirectory() as folder, Server(program, export, base, Path(folder)) as server:
            try:
                picture, problem = _pixels(server.picture(nodes)), ""
            except (OSError, KeyError) as error:
                picture, problem = None, str(error)
            unused = len(re.findall("key not loaded|unet missing|unet unexpected", server.log()))
        if picture is None:
            rows.append(row(file, "ComfyUI", unused, note=f"failed: {problem}"))
            continue
        network = load_student(student).generator.denoiser
        # the sampler's generator has the prompt's seed again, or on CPUs the next
        errors = [(picture - ours(student, network, _seeded(student, more))[0]).abs().max().item() for more in (0, 1)]
        rows.append(row(file, "ComfyUI", unused, "", round(min(errors), 6)))
    return rows


def _seeded(file: Path, more: int) -> list[Tensor]:
    """ComfyUI's noise: of the seed for the first call, of the sampler's own generator for the others."""
    header = read_header(file)
    shape, generator = header.denoiser.net.sample_shape, torch.Generator().manual_seed(SEED)
    first = torch.randn(1, *shape, generator=generator)
    generator.manual_seed(SEED + more)
    return [first, *(torch.randn(1, *shape, generator=generator) for _ in header.times[1:])]


class Server:
    """A ComfyUI with an export's files and the base model among its models."""

    def __init__(self, program: Path, export: Path, base: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        models = {
            "checkpoints": [base.parent, export], "diffusion_models": [export, base.parent], "loras": [export / "lora"],
        }  # fmt: skip
        lists = [
            f"  {kind}: |\n" + "".join(f"    {path.resolve()}\n" for path in paths) for kind, paths in models.items()
        ]
        (folder / "models.yaml").write_text("export:\n" + "".join(lists))
        self._log, port = folder / "log", self.address.rpartition(":")[2]
        command = [sys.executable, "main.py", "--cpu", "--port", port, "--disable-auto-launch"]
        command += ["--extra-model-paths-config", str(folder / "models.yaml"), "--output-directory", str(folder)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=program, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def log(self) -> str:
        """Return its output so far."""
        return self._log.read_text(errors="replace")

    def picture(self, nodes: dict[str, Any]) -> object:
        """The picture of a workflow.

        Raises:
            OSError: the program ended, refused the workflow, or failed.
        """
        from PIL import Image

        body = json.dumps({"prompt": nodes}).encode()
        number = json.loads(self._ask("/prompt", body, wait=True))["prompt_id"]
        while number not in (answer := json.loads(self._ask(f"/history/{number}"))):
            time.sleep(0.2)
        images = [image for node in answer[number]["outputs"].values() for image in node.get("images", ())]
        if not images:
            raise OSError(json.dumps(answer[number].get("status")))
        return Image.open(io.BytesIO(self._ask(f"/view?{urllib.parse.urlencode(images[0])}")))

    def _ask(self, path: str, body: bytes | None = None, wait: bool = False) -> bytes:
        while True:
            try:
                with urllib.request.urlopen(self.address + path, body, timeout=600) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                raise OSError(error.read().decode(errors="replace")) from None
            except urllib.error.URLError:
                if not wait or self._process.poll() is not None:
                    raise OSError("ComfyUI ended: " + self.log()[-500:]) from None
                time.sleep(0.2)


if __name__ == "__main__":
    main()
