"""Sweep a student's LoRA beside a style LoRA: how far the style moves the student as it moves the teacher, at which strengths.

    python tools/stacked_loras.py train world/prepared-twemoji --run runs/emoji-dmd2-4step-lora --out style.safetensors
    python tools/stacked_loras.py sweep style.safetensors --run runs/emoji-dmd2-4step-lora --out stacked.json --card my-4step/README.md

`train` makes a style LoRA of the run's teacher on prepared images (`fewstep prepare`), where none is at hand. `sweep` draws
the teacher with the style alone in many calls and the student with both, from the same prompts and seeds. A picture is
described by the means of its colours on an 8 x 8 grid, the pictures of a prompt by their mean. Two numbers for each pair of
strengths, with D the change that the style makes: `follows` = <D student, D teacher> / |D teacher|², 1 where the student goes
as far in the teacher's direction; `distance` = |student - teacher| with that style over the same without it and at full
strength of the student, 1 where the style costs nothing. On a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.data import Prepared
from fewstep.diffusion.denoiser import Denoiser, denoising_loss
from fewstep.diffusion.guidance import Rule, plain
from fewstep.diffusion.noise import UniformTime
from fewstep.evaluation.candidates import learnt
from fewstep.formats.lora import Factors
from fewstep.formats.lora_reading import read_lora
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.networks.quantized import is_quantized
from fewstep.students.sample import FewStep, ManyStep
from fewstep.students.student import Student, find_student, load_student
from fewstep.system.device import pick_device

NETWORK = "net.model."
BEGIN, END = "<!-- stacked: made by tools/stacked_loras.py -->", "<!-- end of stacked -->"


def open_run(run: Path, device: torch.device) -> Student:
    """The student of adapters in a run folder, on a network whose weights can be changed."""
    file = find_student(run)
    if file is None:
        raise SystemExit(f"{run} holds no few-step student")
    student = load_student(file, device=device)
    if not isinstance(student.generator.denoiser, Adapted) or is_quantized(student.generator.denoiser.base):
        raise SystemExit(f"{run} must be a student of adapters on a network that is not quantised")
    return student


@contextmanager
def styled(network: nn.Module, factors: Mapping[str, Factors], strength: float) -> Iterator[None]:
    """Within it the network's weights are changed by the style; afterwards they are the same bits as before."""
    weights = {path: network.get_submodule(path).get_parameter("weight") for path in factors}
    kept = {path: weight.detach().clone() for path, weight in weights.items()}
    try:
        for path, weight in weights.items():
            weight.data.copy_(factors[path].applied(kept[path], strength))
        yield
    finally:
        for path, weight in weights.items():
            weight.data.copy_(kept[path])


@contextmanager
def strength_of(adapted: Adapted, strength: float) -> Iterator[None]:
    """Within it the student's adapters have another strength."""
    scales = {adapter: adapter.scale for adapter in adapted.adapters().values()}
    try:
        for adapter, scale in scales.items():
            adapter.scale = scale * strength
        yield
    finally:
        for adapter, scale in scales.items():
            adapter.scale = scale


@torch.no_grad()
def described(
    student: Student, denoiser: Denoiser | None, prompts: int, seeds: int, calls: int, device: torch.device
) -> Tensor:
    """Mean descriptions of each prompt's pictures [prompts, 192], of the student or of a teacher's `denoiser` in many calls."""
    rows = []
    for prompt in range(prompts):
        cond = student.conditioner.cond(torch.full((seeds,), prompt), seeds)
        cond = {name: value.to(device) for name, value in cond.items()}
        sampler = FewStep(student.generator) if denoiser is None else ManyStep(denoiser, calls, device)
        samples = sampler(range(prompt * seeds, (prompt + 1) * seeds), student.shape, **cond)
        pictures = student.codec.decode(samples) if student.codec else samples
        rows.append(F.adaptive_avg_pool2d(pictures.float(), 8).flatten(1).mean(0).cpu())
    return torch.stack(rows)


def sweep(
    student: Student, style: Path, students: Sequence[float], styles: Sequence[float], guidance: Rule | float | None, prompts: int,
    seeds: int, calls: int, device: torch.device,
) -> list[dict[str, float]]:  # fmt: skip
    """A row for each pair of strengths."""
    adapted, teacher = student.generator.denoiser, student.teacher
    assert isinstance(adapted, Adapted) and teacher is not None
    network = adapted.base.get_submodule(NETWORK.removesuffix("."))
    lora = read_lora(style)
    if lora.text_keys:
        print(f"{len(lora.text_keys)} keys of {style} belong to text encoders and are left out", file=sys.stderr)
    factors, guided = lora.for_network(network), teacher.guided(guidance)

    def draw(strength: float | None, of_style: float) -> Tensor:
        with styled(network, factors, of_style):
            if strength is None:
                return described(student, guided, prompts, seeds, calls, device)
            with strength_of(adapted, strength):
                return described(student, None, prompts, seeds, calls, device)

    plain = draw(None, 0.0)
    usual = (draw(1.0, 0.0) - plain).norm()
    rows = []
    for of_style in styles:
        wanted = draw(None, of_style)
        change = (wanted - plain).flatten()
        for strength in students:
            found = draw(strength, of_style)
            own = (found - draw(strength, 0.0)).flatten()
            follows = (own @ change / (change @ change)).item() if of_style else float("nan")
            rows.append(
                {
                    "student": strength,
                    "style": of_style,
                    "follows": follows,
                    "distance": ((found - wanted).norm() / usual).item(),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def table(rows: Sequence[Mapping[str, float]], style: str, protocol: str) -> str:
    """The section of a card."""
    lines = [
        BEGIN,
        "## Beside another LoRA",
        "",
        f"Measured with `{style}` ({protocol}). `follows`: the style's change of the student over its change of the teacher (1 is the "
        "same); `distance`: to the teacher with that style, over the same without a style.",
        "",
        "| strength of this LoRA | of the style | follows | distance |",
        "|---|---|---|---|",
    ]
    for row in rows:
        follows = "" if row["follows"] != row["follows"] else f"{row['follows']:.2f}"
        lines.append(f"| {row['student']:g} | {row['style']:g} | {follows} | {row['distance']:.2f} |")
    return "\n".join([*lines, "", END])


def train_style(
    student: Student, images: Path, out: Path, rank: int, updates: int, batch: int, lr: float, device: torch.device
) -> None:
    """Train adapters on prepared images with the denoising loss, and write them under diffusers' names, alpha equal to rank."""
    adapted, teacher = student.generator.denoiser, student.teacher
    assert isinstance(adapted, Adapted) and teacher is not None
    data = Prepared(path=images).load()
    spec = LoraSpec(rank=rank, alpha=rank, targets=adapted.spec.targets)
    made = Adapted(adapted.base, spec).to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(made.parameters(), lr)
    for number in range(updates):
        x, labels = data.batch(torch.randint(len(data), (batch,)))
        cond = {name: value.to(device) for name, value in teacher.conditioner.cond(labels, batch).items()}
        t = UniformTime().draw(batch, made.schedule).to(device)
        loss = denoising_loss(made, x.to(device), t, torch.randn(x.shape).to(device), cond)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 100 == 0:
            print(f"update {number}: loss {loss.item():.4f}", file=sys.stderr)
    component = "unet" if hasattr(adapted.base.get_submodule(NETWORK.removesuffix(".")), "mid_block") else "transformer"
    tensors = {}
    for path, adapter in made.adapters().items():
        name = f"{component}.{path.removeprefix(NETWORK)}"
        tensors[f"{name}.lora_A.weight"] = adapter.down.detach().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = adapter.up.detach().cpu().contiguous()
    save_file(tensors, out, {"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("train", "folder of prepared images"), ("sweep", "the style LoRA")):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, help=what)
        command.add_argument("--run", type=Path, required=True, help="folder of a run of adapters")
        command.add_argument("--out", type=Path, required=True, help="file to write")
        command.add_argument("--device", default="auto")
        if name == "train":
            command.add_argument("--rank", type=int, default=8)
            command.add_argument("--updates", type=int, default=1000)
            command.add_argument("--batch", type=int, default=16)
            command.add_argument("--lr", type=float, default=1e-3)
        else:
            command.add_argument(
                "--students", type=float, nargs="+", default=[0.5, 0.75, 1.0], help="strengths of the student's LoRA"
            )
            command.add_argument(
                "--styles", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="strengths of the style"
            )
            command.add_argument("--guidance", type=float, help="of the teacher; the run's own if it is left out")
            command.add_argument(
                "--prompts", type=int, default=16, help="the first of those that the run was trained with"
            )
            command.add_argument("--seeds", type=int, default=16, help="pictures of each prompt")
            command.add_argument("--calls", type=int, default=19, help="network calls of the teacher")
            command.add_argument("--card", type=Path, help="README.md of an export, which gets the table")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    torch.manual_seed(0)
    student = open_run(options.run, device)
    if options.command == "train":
        train_style(
            student, options.source, options.out, options.rank, options.updates, options.batch, options.lr, device
        )
        return
    trained = learnt((student.provenance.get("run") or {}).get("objective") or {})
    guidance = trained if options.guidance is None else options.guidance
    prompts = min(options.prompts, student.conditioner.num_classes)
    rows = sweep(
        student,
        options.source,
        options.students,
        options.styles,
        guidance,
        prompts,
        options.seeds,
        options.calls,
        device,
    )
    protocol = f"{prompts} prompts x {options.seeds} seeds, the teacher in {options.calls} calls"
    options.out.write_text(
        json.dumps(
            {"style": options.source.name, "protocol": protocol, "guidance": plain(guidance), "rows": rows}, indent=2
        )
        + "\n"
    )
    text = table(rows, options.source.name, protocol)
    print(text)
    if options.card is not None:
        card = options.card.read_text(encoding="utf-8")
        if BEGIN in card:
            card = card[: card.index(BEGIN)].rstrip() + card[card.index(END) + len(END) :]
        options.card.write_text(f"{card.rstrip()}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
