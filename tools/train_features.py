"""Train the two small networks that ship with fewstep, and make the shipped Fashion-MNIST reference.

    python tools/train_features.py features     # the network that evaluates: assets/features/small64.*
    python tools/train_features.py perceptual   # the one of the regression loss: assets/features/perceptual.*
    python tools/train_features.py reference    # assets/features/fashion-mnist-train.npz, made with small64

One thread and one seed: the same command on the same machine and torch gives the same bytes.
"""

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from fewstep.data import FashionMNIST, ImageDataset, to_unit
from fewstep.evaluation.perceptual import PerceptualNet
from fewstep.evaluation.small_features import SmallFeatures, SmallNet

FOLDER = Path(__file__).parents[1] / "fewstep" / "assets" / "features"


@dataclass(frozen=True)
class Training:
    """Settings of one training: AdamW, one-cycle learning rate, cross entropy."""

    seed: int
    images: int  # seen in training, each epoch a new order
    batch: int = 128
    peak_lr: float = 4e-3
    weight_decay: float = 1e-2
    shift: int = 2  # pixels, at most, each way
    mirror: float = 0.0  # probability
    noise: float = 0.0  # standard deviation at most, for images in [-1, 1]; drawn per image
    erase: int = 0  # side of a square set to a random grey, in half of the images


TRAIN, TEST = FashionMNIST(split="train"), FashionMNIST(split="test")

# The two differ in architecture, seed and augmentation, so that a student does not train on what scores it.
NETWORKS: dict[str, tuple[str, type[nn.Module], Training]] = {
    "features": ("small64", SmallNet, Training(seed=0, images=480_000)),
    "perceptual": (
        "perceptual",
        PerceptualNet,
        Training(seed=1, images=420_000, mirror=0.5, noise=0.5, erase=8),
    ),
}


def augment(x: Tensor, how: Training, rng: torch.Generator) -> Tensor:
    """One random shift, mirroring, erased square and noise level per image; x: float [B, 1, 28, 28]."""
    b, _, h, w = x.shape
    rows, cols = torch.arange(h), torch.arange(w)
    dy, dx = torch.randint(0, 2 * how.shift + 1, (2, b, 1), generator=rng)
    padded = F.pad(x, [how.shift] * 4, value=-1.0)[:, 0]
    x = padded[torch.arange(b)[:, None, None], (rows + dy)[:, :, None], (cols + dx)[:, None, :]][:, None]
    if how.mirror:
        x = torch.where(torch.rand(b, 1, 1, 1, generator=rng) < how.mirror, x.flip(3), x)
    if how.erase:
        top, left = torch.randint(0, h - how.erase + 1, (2, b, 1), generator=rng)
        inside_rows = (rows >= top) & (rows < top + how.erase)
        inside_cols = (cols >= left) & (cols < left + how.erase)
        chosen = torch.rand(b, 1, 1, 1, generator=rng) < 0.5
        square = (inside_rows[:, :, None] & inside_cols[:, None, :])[:, None] & chosen
        x = torch.where(square, 2 * torch.rand(b, 1, 1, 1, generator=rng) - 1, x)
    if how.noise:
        x = x + how.noise * torch.rand(b, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
    return x


def labels_of(dataset: ImageDataset) -> Tensor:
    if dataset.labels is None:
        raise ValueError(f"{dataset.name} has no labels to train a classifier with")
    return dataset.labels


def images_of(dataset: ImageDataset) -> Tensor:
    return dataset.images[:]


@torch.no_grad()
def accuracy(net: nn.Module, dataset: ImageDataset) -> float:
    net.eval()
    guesses = [net(to_unit(chunk)).argmax(1) for chunk in images_of(dataset).split(500)]
    return (torch.cat(guesses) == labels_of(dataset)).double().mean().item()


def train(kind: type[nn.Module], how: Training, data: ImageDataset, test: ImageDataset) -> nn.Module:
    torch.manual_seed(how.seed)
    rng = torch.Generator().manual_seed(how.seed)
    net = kind()
    steps = how.images // how.batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=how.peak_lr, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=how.peak_lr, total_steps=steps, pct_start=0.2)
    images, labels = images_of(data), labels_of(data)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < how.batch:
            order = torch.cat([order, torch.randperm(len(labels), generator=rng)])
        rows, order = order[: how.batch], order[how.batch :]
        net.train()
        loss = F.cross_entropy(net(augment(to_unit(images[rows]), how, rng)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            print(
                f"{step * how.batch} images  loss {loss.item():.3f}  test {accuracy(net, test):.4f}",
                flush=True,
            )
    return net.eval()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def make_network(which: str) -> None:
    name, kind, how = NETWORKS[which]
    data, test = TRAIN.load(), TEST.load()
    started = time.time()
    net = train(kind, how, data, test)
    seconds = time.time() - started
    content = save({key: value.contiguous() for key, value in net.state_dict().items()})
    card = {
        "name": name,
        "architecture": f"{kind.__module__}.{kind.__qualname__}",
        "purpose": "evaluation features (fewstep.evaluation.small_features.SmallFeatures)"
        if which == "features"
        else "perceptual distance in losses (fewstep.evaluation.perceptual.SmallPerceptual); never evaluates",
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": hashlib.sha256(content).hexdigest(),
        "test_accuracy": accuracy(net, test),
        "train_accuracy": accuracy(net, data),
        "images_seen": how.images // how.batch * how.batch,
        "training": asdict(how),
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint},
        "command": f"python tools/train_features.py {which}",
        "hardware": f"{processor()}, 1 thread",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "seconds": round(seconds),
        "date": date.today().isoformat(),
        "licence": "weights Apache-2.0; trained on Fashion-MNIST (MIT, Xiao et al. 2017, arXiv 1708.07747)",
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.safetensors").write_bytes(content)
    (FOLDER / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))


def make_reference() -> None:
    from fewstep.evaluation.reference import Reference

    reference = Reference.from_dataset(TRAIN.load(), SmallFeatures())
    reference.save(FOLDER / "fashion-mnist-train.npz")
    print(reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*NETWORKS, "reference"])
    what = parser.parse_args().what
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if what == "reference":
        make_reference()
    else:
        make_network(what)


if __name__ == "__main__":
    main()
