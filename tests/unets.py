"""A small class-conditional UNet for the tests, as a user's module of Python."""

from __future__ import annotations

import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MODULE = """
    import math
    from types import SimpleNamespace

    import torch
    from torch import nn


    class Block(nn.Module):
        def __init__(self, into, out, time):
            super().__init__()
            self.norm = nn.GroupNorm(2, into)
            self.first = nn.Conv2d(into, out, 3, padding=1)
            self.time = nn.Linear(time, out)
            self.drop = nn.Dropout(0.1)
            self.second = nn.Conv2d(out, out, 3, padding=1)
            self.skip = nn.Conv2d(into, out, 1)

        def forward(self, x, time):
            hidden = self.first(nn.functional.silu(self.norm(x))) + self.time(time)[:, :, None, None]
            return self.second(self.drop(nn.functional.silu(hidden))) + self.skip(x)


    class UNet(nn.Module):
        def __init__(self, channels, width, classes):
            super().__init__()
            self.width = width
            self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
            self.classes = nn.Embedding(classes, 2 * width) if classes else None
            self.enter = nn.Conv2d(channels, width, 3, padding=1)
            self.down = Block(width, 2 * width, 2 * width)
            self.up = Block(3 * width, width, 2 * width)
            self.leave = nn.Conv2d(width, channels, 3, padding=1)

        def forward(self, x, t, y=None):
            rates = torch.exp(torch.arange(self.width // 2, device=x.device) * (-math.log(1e4) / (self.width // 2)))
            angles = t[:, None] * rates
            time = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
            if self.classes is not None:
                time = time + self.classes(y)
            entered = self.enter(x)
            low = self.down(nn.functional.avg_pool2d(entered, 2), time)
            high = nn.functional.interpolate(low, scale_factor=2.0)
            return self.leave(self.up(torch.cat([entered, high], 1), time))


    def make(channels=3, width=4, classes=0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UNet(channels, width, classes)


    class Wrapped(UNet):
        def forward(self, x, t, y=None):
            return SimpleNamespace(sample=super().forward(x, t, y))


    def wrapped():
        model = Wrapped(3, 4, 0)
        model.load_state_dict(make().state_dict())
        return model


    class Doubled(UNet):
        def forward(self, x, t):
            predicted = super().forward(x, t)
            return torch.cat([predicted, predicted], 1)


    def doubled():
        return Doubled(3, 4, 0)
"""


@contextmanager
def on_path(folder: Path) -> Iterator[str]:
    """Write the module into a folder of Python's path, under a name that no test had before."""
    name = f"unets_{uuid.uuid4().hex}"
    (folder / f"{name}.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield name
