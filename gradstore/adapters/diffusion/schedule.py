"""How much noise a DDPM adds at each timestep, which timesteps an example is seen at, and the noise itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np

Kind = Literal["linear", "scaled_linear", "cosine"]
# Nichol and Dhariwal (arXiv 2102.09672, eq. 17): their offset, and the largest beta.
_OFFSET: Final = 0.008
_LARGEST_BETA: Final = 0.999


def noise_levels(kind: Kind, steps: int, beta_start: float, beta_end: float) -> np.ndarray:
    r"""Return :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`, float64 [steps]: what is left of an image's variance.

    Betas grow linearly from ``beta_start`` to ``beta_end`` (DDPM, arXiv 2006.11239); their roots do in ``scaled_linear``
    (latent diffusion). In ``cosine`` (arXiv 2102.09672, eq. 17) the product itself is a squared cosine.
    """
    if kind == "cosine":

        def left(time: float) -> float:
            return math.cos((time / steps + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

        betas = np.array([min(1 - left(step + 1) / left(step), _LARGEST_BETA) for step in range(steps)])
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps) ** 2
    else:
        betas = np.linspace(beta_start, beta_end, steps)
    product: np.ndarray = np.cumprod(1 - betas)
    return product


def evenly_spaced(count: int, steps: int) -> tuple[int, ...]:
    """Return ``count`` timesteps of 0 ... steps - 1, from 0 on, in equal strides but for rounding."""
    return tuple(place * steps // count for place in range(count))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """The noise levels of a model, and the settings that they are computed from, which are compared in their place."""

    levels: np.ndarray
    facts: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """The noised copies in which every example is seen.

    Attributes
    ----------
    seed
        What the noises are drawn from.
    timesteps
        Those at which noise is added.
    noises
        Noises at each.
    """

    seed: int
    timesteps: tuple[int, ...]
    noises: int

    def __len__(self) -> int:
        return len(self.timesteps) * self.noises

    @property
    def times(self) -> np.ndarray:
        """The timestep of every copy, int64 [S]."""
        return np.repeat(np.array(self.timesteps, np.int64), self.noises)

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the noise of every copy, float32 [S, *shape]: not to be written to."""
        return _noise(self, shape)


# Drawn once a process: the same for all examples of all sets, so it is part of every batch.
@lru_cache(maxsize=4)
def _noise(copies: Copies, shape: tuple[int, ...]) -> np.ndarray:
    """Keyed by the timestep, so that neither other timesteps nor more noises change what is added at this one."""
    from gradstore.numerics.generator import derive_key, normal

    drawn = [
        normal(derive_key(copies.seed, f"timestep {timestep}", "noise"), copies.noises, math.prod(shape))
        for timestep in copies.timesteps
    ]
    noise = np.concatenate(drawn).astype(np.float32).reshape(len(copies), *shape)
    noise.flags.writeable = False
    return noise
