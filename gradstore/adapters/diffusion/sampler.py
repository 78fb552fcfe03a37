"""Images that a diffusion model makes itself, to be queries (arXiv 2506.05647, section 5.1.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from gradstore.adapters.diffusion.schedule import evenly_spaced
from gradstore.adapters.images.classes import Classes
from gradstore.adapters.text.generation import one_thread
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection, resolve_kind

if TYPE_CHECKING:
    from torch import Tensor

# Samples are always made in these batches, counted from the first: how many are asked for changes none of them.
_AT_ONCE: Final = 16

Predict = Callable[["Tensor", int, Sequence[int]], "Tensor"]
"""The predicted noise of images [n, C, H, W] at one timestep, whose samples have these numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The table ``generate`` of a split: how the model makes its images.

    Attributes
    ----------
    seed
        Of the noise that samples begin with; each has its own, by its number.
    sampler
        ``ddim`` adds no noise on the way (arXiv 2010.02502); ``ddpm`` draws from the posterior (arXiv 2006.11239).
    steps
        Evenly spaced timesteps that it takes.
    classes
        The classes that are made, in turn; of a conditional model all that data.train has, unless given.
    trajectory
        Whether the noisy image that every step began with is stored, too: gradients are then taken there, not at copies
        that are noised anew. It takes 4 bytes for every value of every step.
    device
        Where the creator of the store runs the model; ``auto`` is CUDA where it sees it.
    """

    seed: int = 0
    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: int = 50
    classes: list[int | str] | None = None
    trajectory: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def processor(self) -> str:
        """The device that ``auto`` stands for here."""
        import torch

        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image that the model made.

    Attributes
    ----------
    number
        Which of the seed's samples it is.
    image
        float32 [C, H, W] in [-1, 1].
    trajectory
        What each step began with, float32 [steps, C, H, W], from the noisiest on.
    timesteps
        Of these, int64 [steps].
    """

    number: int
    image: np.ndarray
    trajectory: np.ndarray
    timesteps: np.ndarray


def resolve_sampling(split: SplitSection, key: str, steps: int) -> Sampling | None:
    """Return how a split's images are made, None if they are read from its source; ``steps`` are those of the model.

    Raises
    ------
    SpecError
        If a key is unknown or has no such value, or the split does not say how many images are made.
    """
    if split.generate is None:
        return None
    sampling = resolve_kind({"generate": Sampling}, "generate", split.generate, f"{key}.generate")
    if key == "data.train":
        raise SpecError(f"{key}.generate: training examples cannot be generated; only queries can.")
    if not 1 <= sampling.steps <= steps:
        raise SpecError(
            f"{key}.generate.steps: found {sampling.steps}; accepted: 1 to {steps:,}, the timesteps of the model."
        )
    if not 0 <= sampling.seed < 2**63:
        raise SpecError(f"{key}.generate.seed: found {sampling.seed}; accepted: 0 or more, below 2**63.")
    if sampling.classes == []:
        raise SpecError(f"{key}.generate.classes: found []; accepted: one class or more, or leave it out.")
    if split.rows is None:
        raise SpecError(f"{key}.rows: is missing; say how many images are generated.")
    return sampling


def samples(
    predict: Predict, sampling: Sampling, levels: np.ndarray, rows: tuple[int, int], shape: tuple[int, ...]
) -> Iterator[Sample]:
    """Make the samples [start, stop) of a seed, in float32 and on one thread.

    The same numbers make the same images in every run on one kind of machine.

    Parameters
    ----------
    predict
        The model.
    sampling
        How it is sampled.
    levels
        Of its schedule; see `noise_levels`.
    rows
        Numbers of the first sample and after the last.
    shape
        [C, H, W] of an image.

    Raises
    ------
    DataError
        If the model makes something that is no number.
    """
    start, stop = rows
    timesteps = np.array(evenly_spaced(sampling.steps, len(levels))[::-1], np.int64)
    for first in range(start - start % _AT_ONCE, stop, _AT_ONCE):
        numbers = range(first, first + _AT_ONCE)
        images, trajectories = _batch(predict, sampling, levels, numbers, shape)
        for number, image, trajectory in zip(numbers, images, trajectories, strict=True):
            if not start <= number < stop:
                continue
            if not np.isfinite(image).all():
                raise DataError(f"generate: sample {number} of the model is not finite. Name a sound model.")
            yield Sample(number=number, image=image, trajectory=trajectory, timesteps=timesteps)


def _batch(
    predict: Predict, sampling: Sampling, levels: np.ndarray, numbers: Sequence[int], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, C, H, W] and trajectories [n, steps, C, H, W] of some samples."""
    import torch

    timesteps = evenly_spaced(sampling.steps, len(levels))[::-1]
    # After the last step there is no noise.
    left = dict(zip((*timesteps, -1), (*(float(levels[t]) for t in timesteps), 1.0), strict=True))
    x = _drawn(sampling.seed, numbers, "start", shape).to(sampling.processor)
    path = []
    with torch.inference_mode(), one_thread():
        for now, later in pairwise((*timesteps, -1)):
            path.append(x)
            noise = None
            if sampling.sampler == "ddpm" and later >= 0:
                noise = _drawn(sampling.seed, numbers, f"after timestep {now}", shape).to(x.device)
            x = _step(x, predict(x, now, numbers), left[now], left[later], noise)
    return x.cpu().numpy(), torch.stack(path, 1).cpu().numpy()


def _step(x: Tensor, predicted: Tensor, now: float, later: float, noise: Tensor | None) -> Tensor:
    r"""Return x at the level ``later`` from x at the level ``now``: eq. 12 of DDIM (arXiv 2010.02502).

    With noise, :math:`\sigma^2 = (1 - \bar\alpha') / (1 - \bar\alpha) (1 - \bar\alpha / \bar\alpha')` makes it the
    posterior of DDPM. The image that x stands for is held to [-1, 1], and the direction follows it.
    """
    image = ((x - math.sqrt(1 - now) * predicted) / math.sqrt(now)).clamp(-1, 1)
    direction = (x - math.sqrt(now) * image) / math.sqrt(1 - now)
    variance = 0.0 if noise is None else (1 - later) / (1 - now) * (1 - now / later)
    x = math.sqrt(later) * image + math.sqrt(max(1 - later - variance, 0.0)) * direction
    return x if noise is None else x + math.sqrt(variance) * noise


def _drawn(seed: int, numbers: Sequence[int], role: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of every sample, float32 [n, *shape], keyed by its number."""
    import torch

    from gradstore.numerics.generator import derive_key, normal

    drawn = [normal(derive_key(seed, f"sample {number}", role), 1, math.prod(shape)) for number in numbers]
    return torch.from_numpy(np.concatenate(drawn).astype(np.float32).reshape(len(drawn), *shape))


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Return an image in [-1, 1] as bytes, rounded."""
    pixels: np.ndarray = np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels


def classes_in_turn(sampling: Sampling, found: Sequence[int], classes: Classes, key: str) -> list[int]:
    """Return the numbers of the classes that samples have in turn: those asked for, else all that were found.

    Raises
    ------
    SpecError
        If a class that is asked for is none.
    """
    known = sorted(set(found))
    if sampling.classes is None:
        return known
    numbers: dict[int | str, int] = {number: number for number in known}
    if classes.names is not None:
        numbers = {name: number for number, name in enumerate(classes.names)}
    for name in sampling.classes:
        if name not in numbers:
            raise SpecError(
                f"{key}.generate.classes: found {name!r}; accepted: {', '.join(map(repr, [*numbers][:10]))}."
            )
    return [numbers[name] for name in sampling.classes]
