"""Networks of classes that the package has never seen, as other people write them. All take `net(x, label)`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A transformer block with dropout, called by keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.3), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, *, shift: Tensor) -> Tensor:
        normed = self.norm1(tokens) + shift[:, None]
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class ViT(nn.Module):
    """Blocks in a ModuleList in a ModuleDict; images [B, 1, 8, 8]."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "embed": nn.Conv2d(1, width, 4, stride=4),
                "time": nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width)),
                "layers": nn.ModuleList(Layer(width) for _ in range(depth)),
                "out": nn.Linear(width, 16),
            }
        )

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        tokens = self.parts["embed"](x).flatten(2).transpose(1, 2)
        shift = self.parts["time"](label.float()[:, None])
        for layer in self.parts["layers"]:
            tokens = layer(tokens, shift=shift)
        return F.fold(self.parts["out"](tokens).transpose(1, 2), 8, 4, stride=4)


def resnet_block(width: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return Residual(
        nn.Conv2d(width, width, 3, padding=1),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        norm(width),
    )


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class ResNet(nn.Module):
    """Stages in `nn.Sequential`, as torchvision's; `norm` makes the layers of normalisation."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stage1 = nn.Sequential(resnet_block(8, norm), resnet_block(8, norm))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 1), resnet_block(16, norm))
        self.out = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.out(self.stage2(self.stage1(self.stem(x) + label.float()[:, None, None, None])))


class Convs(nn.Sequential):
    """Convolutions in a row: nothing is repeated."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return super().forward(x)


class Level(nn.Module):
    """Levels as modules without a forward, whose children the network calls itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(resnet_block(width, nn.Identity) for _ in range(2))
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Level(1), Level(1)])
        self.mid = nn.Module()
        self.mid.block_1 = resnet_block(1, nn.Identity)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = x
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.down(h)
        return F.interpolate(self.mid.block_1(h), x.shape[2:])


class Output:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Opaque(nn.Module):
    """A block that returns an object."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Output:
        return Output(self.second(F.silu(self.first(x))))


class OpaqueNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Opaque() for _ in range(2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        for step in self.steps:
            x = x + step(x).sample
        return x


def tied_vit() -> ViT:
    """Two blocks with one MLP."""
    net = ViT()
    net.parts["layers"][1].mlp = net.parts["layers"][0].mlp
    return net


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


def images(count: int = 4) -> tuple[Tensor, Tensor]:
    """Noisy samples [count, 1, 8, 8] and labels [count], the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.rand(count, generator=generator)
