"""Layers that models have and that are not what their class or name says, or are used in unusual ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormOfChannels(nn.LayerNorm):
    """A norm that is one by its class, of the second dimension, as ConvNeXt's are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch has
        """Channels normalised."""
        return super().forward(input.transpose(1, -1)).transpose(1, -1)


class ChannelsLayerNorm(nn.Module):
    """A norm by its name alone, of the second dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, values: Tensor) -> Tensor:
        """Channels normalised."""
        centred = values - values.mean(1, keepdim=True)
        scaled: Tensor = centred * torch.rsqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None] * scaled + self.bias[:, None]


class Calling(nn.Module):
    """A layer of no known kind that calls another, as DoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(6))

    def forward(self, *, layer: nn.Module, shift: Tensor, values: Tensor) -> Tensor:
        """[B, T, 6]; the input is not the first keyword."""
        # Without a first dimension of examples, and without a gradient.
        size = layer(torch.eye(6, dtype=values.dtype)).detach().norm()
        return torch.tanh(self.scale * layer(values + shift) / size)


class Unusual(nn.Module):
    """Norms of channels, a layer whose output a hook changes, layers that call others, a name that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(6, 30)
        self.derived = NormOfChannels(6)
        self.named = ChannelsLayerNorm(6)
        self.called = nn.Linear(6, 6)
        self.calling = Calling()
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda module, args, output: 2 * torch.tanh(output))
        self.never_called = nn.Linear(6, 6, bias=False)
        self.never_called.weight = self.hooked.weight
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        channels = torch.tanh(self.spread(values)).reshape(-1, 6, 5)
        rows = torch.tanh(self.named(self.derived(channels))).transpose(1, 2)
        called = self.calling(shift=rows.detach().cos(), layer=self.called, values=rows)
        result: Tensor = self.head(self.hooked(called).mean(1))
        return result
