"""Calls of a diffusion model, and what is said where a user's module cannot take what it is given or returns something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor, nn


def predict_noise(
    model: nn.Module, source: str, noisy: Tensor, times: np.ndarray, classes: Mapping[str, np.ndarray | None]
) -> Tensor:
    """Return the noise that a model sees in images [n, C, H, W] at timesteps [n].

    Parameters
    ----------
    model, source
        The model, and what run.toml calls it.
    noisy, times
        The images and their timesteps.
    classes
        Their classes [n] by the argument that takes them; nothing of a model without classes.

    Raises
    ------
    SpecError
        If the model cannot be run on the images, or returns something else than their noise.
    """
    import torch

    given = {name: torch.from_numpy(np.asarray(of, np.int64)).to(noisy.device) for name, of in classes.items()}
    try:
        predicted = model(noisy, torch.from_numpy(times).to(noisy.device), **given)
    except torch.OutOfMemoryError:
        raise
    # What a module says of what it cannot take.
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        of_class = "".join(f" and classes up to {int(of.max())}" for of in given.values())
        raise SpecError(
            f"model.source: {source} cannot be run on images of {list(noisy.shape[1:])} [channels, height, "
            f"width] at timesteps up to {times.max():,}{of_class}: {error}. Set model.options.channels, size, steps and "
            "class_argument to what it takes."
        ) from error
    predicted = getattr(predicted, "sample", predicted)
    if not isinstance(predicted, torch.Tensor) or predicted.shape != noisy.shape:
        found = list(predicted.shape) if isinstance(predicted, torch.Tensor) else type(predicted).__name__
        raise SpecError(
            f"model.source: {source} returns {found} for images of {list(noisy.shape)}; it must return the "
            "noise in them, of their shape, or an object whose sample that is."
        )
    return predicted
