"""A small class-conditional UNet of images of 8 x 8."""

import math

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions, the second of what the timestep and the class are added to, beside a third of 1 x 1."""

    def __init__(self, into: int, out: int, time: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, into)
        self.first = nn.Conv2d(into, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1)

    def forward(self, values: Tensor, time: Tensor) -> Tensor:
        """Values [B, into, H, W] and what is known of each [B, time]."""
        hidden = self.first(nn.functional.silu(self.norm(values))) + self.time(time)[:, :, None, None]
        result: Tensor = self.second(nn.functional.silu(hidden)) + self.skip(values)
        return result


class UNet(nn.Module):
    """Down to 4 x 4 and up again."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.classes = nn.Embedding(classes, 2 * width)
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = Block(width, 2 * width, 2 * width)
        self.middle = Block(2 * width, 2 * width, 2 * width)
        self.up = Block(3 * width, width, 2 * width)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in images [B, 1, 8, 8] at timesteps [B], of classes [B]."""
        rates = torch.exp(torch.arange(self.width // 2, device=x.device) * (-math.log(1e4) / (self.width // 2)))
        angles = t[:, None] * rates
        known = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)) + self.classes(y)
        entered = self.enter(x)
        low = self.middle(self.down(nn.functional.avg_pool2d(entered, 2), known), known)
        high = nn.functional.interpolate(low, scale_factor=2.0)
        result: Tensor = self.leave(self.up(torch.cat([entered, high], 1), known))
        return result


def unet(width: int = 32, classes: int = 10) -> nn.Module:
    """Make the UNet."""
    return UNet(width, classes)
