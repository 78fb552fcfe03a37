"""Small classifiers of gray images: a residual network of convolutions, a vision transformer, and a deep perceptron."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions of 3 x 3 whose result is added to what enters them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        """Values [B, width, H, W]."""
        result: Tensor = values + self.second(torch.relu(self.first(torch.relu(values))))
        return result


def cnn(width: int = 16, blocks: int = 4) -> nn.Module:
    """Make the residual network: a stem, blocks at 14 x 14 and at 7 x 7, and a linear head."""
    half = blocks // 2
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        *(Residual(width) for _ in range(half)),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        *(Residual(2 * width) for _ in range(blocks - half)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what enters it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        """Values [B, T, width]."""
        size, tokens, width = values.shape
        parts = self.qkv(self.norms[0](values)).reshape(size, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(size, tokens, width)
        values = values + self.out(mixed)
        result: Tensor = values + self.down(nn.functional.gelu(self.up(self.norms[1](values))))
        return result


class VisionTransformer(nn.Module):
    """Patches of 7 x 7 pixels, blocks, and a linear head on the mean of all tokens."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 28, 28]."""
        values = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            values = block(values)
        result: Tensor = self.head(self.norm(values).mean(1))
        return result


def vit(width: int = 32, depth: int = 4, heads: int = 2) -> nn.Module:
    """Make the vision transformer."""
    return VisionTransformer(width, depth, heads)


def mlp(width: int = 64, depth: int = 12) -> nn.Module:
    """Make the perceptron, of images of 8 x 8: linear layers with a ReLU between them."""
    hidden = [layer for _ in range(depth - 2) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))
