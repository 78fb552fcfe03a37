"""Networks that classify images, as a module of a user has them, and the adapter that takes them."""

from __future__ import annotations

import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gradstore.adapters.image_classifier import ImageClassifier
from gradstore.spec import DataSection, ModelSection

MODULE = """
    import torch
    from torch import nn

    LIMIT = 3

    def make(classes=3, channels=3):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16, classes),
        )

    class Nets:
        @staticmethod
        def large():
            return make().double()

    def fails():
        raise KeyError("weights")

    def number():
        return 3

    def wrong_shape():
        return nn.Conv2d(3, 3, 3)
"""
SPLITS: dict[str, Any] = {"train": {"rows": 6}, "learn": {"rows": 3}, "eval": {"rows": 3}}


@contextmanager
def networks(folder: Path) -> Iterator[str]:
    """The name of a module of networks, written into a folder that is put on Python's path."""
    name = f"nets_{uuid.uuid4().hex}"
    (folder / f"{name}.py").write_text(textwrap.dedent(MODULE))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield name


def classifier(
    source: str, data: Path, *, seed: int = 0, splits: dict[str, Any] | None = None, **model: Any
) -> ImageClassifier:
    options = model.pop("options", {})
    section = {"source": str(data), **(splits or SPLITS)}
    return ImageClassifier(
        ModelSection(adapter="image_classifier", source=source, options=options, **model),
        DataSection.model_validate(section),
        seed,
    )
