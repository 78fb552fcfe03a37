"""What run.toml may say of a diffusion model beside [model], checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from gradstore.adapters.diffusion.schedule import Copies, Kind, Schedule, evenly_spaced, noise_levels
from gradstore.adapters.images.pixels import Preparation, resolve_preparation
from gradstore.errors import SpecError

_STEPS: Final = 1000
_BETAS: Final = (1e-4, 0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionOptions:
    """[model.options]: how a UNet is made and called, its noise schedule, and how images become its inputs.

    Attributes
    ----------
    arguments
        What the function that makes the model is called with.
    class_argument
        The name of the argument in which the model takes classes [n]; none if it takes none. A UNet of diffusers says so
        itself.
    schedule, steps, beta_start, beta_end
        The schedule that the model was trained with, linear over 1,000 steps from 0.0001 to 0.02 unless given; see
        `noise_levels`. Refused where diffusers saved one.
    timesteps
        The timesteps that an image is noised at: how many, evenly spaced, or which.
    noises
        Noises at each timestep.
    copies_per_call
        Noised copies of an image that the model takes at a time, all unless given. Fewer take less memory, since their
        activations are made again when they are needed, which is another forward pass.
    size
        One number or [height, width]: images are resized to it. Without it all must have one shape.
    channels
        3 or 1: images are converted to it. Without it all must have one number of channels.
    classes
        The names of the classes in the order of their numbers.
    """

    arguments: dict[str, Any] | None = None
    class_argument: str | None = None
    schedule: Kind | None = None
    steps: int | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    timesteps: int | list[int] = 50
    noises: int = 1
    copies_per_call: int | None = None
    size: int | list[int] | None = None
    channels: int | None = None
    classes: list[str] | None = None

    def resolve_schedule(self, saved: Schedule | None) -> Schedule:
        """Return the saved schedule if there is one, else what the options say.

        Raises
        ------
        SpecError
            If both say something, or a number makes no schedule.
        """
        given = {name: getattr(self, name) for name in ("schedule", "steps", "beta_start", "beta_end")}
        given = {name: value for name, value in given.items() if value is not None}
        if saved is not None:
            for name, value in given.items():
                raise SpecError(
                    f"model.options.{name}: found {value!r}, but model.source has a saved schedule, {dict(saved.facts)}. "
                    "Leave it out."
                )
            return saved
        kind, steps = self.schedule or "linear", _STEPS if self.steps is None else self.steps
        if steps < 2:
            raise SpecError(f"model.options.steps: found {steps}; accepted: 2 or more.")
        if kind == "cosine":
            for name in ("beta_start", "beta_end"):
                if name in given:
                    raise SpecError(
                        f"model.options.{name}: found {given[name]}; a cosine schedule has none. Leave it out."
                    )
            return Schedule(levels=noise_levels(kind, steps, *_BETAS), facts={"schedule": kind, "steps": steps})
        first = _BETAS[0] if self.beta_start is None else self.beta_start
        last = _BETAS[1] if self.beta_end is None else self.beta_end
        if not 0 < first <= last < 1:
            raise SpecError(
                f"model.options.beta_start, beta_end: found {first}, {last}; accepted: 0 < beta_start <= beta_end < 1."
            )
        facts = {"schedule": kind, "steps": steps, "beta_start": first, "beta_end": last}
        return Schedule(levels=noise_levels(kind, steps, first, last), facts=facts)

    def resolve_copies(self, schedule: Schedule, seed: int) -> Copies:
        """Return the noised copies of every image.

        Raises
        ------
        SpecError
            If a timestep is none of the model's, or a count is not at least 1.
        """
        last = schedule.steps - 1
        if isinstance(self.timesteps, int):
            if not 1 <= self.timesteps <= schedule.steps:
                raise SpecError(
                    f"model.options.timesteps: found {self.timesteps}; accepted: 1 to {schedule.steps:,} timesteps, or a "
                    f"list of those from 0 to {last:,}."
                )
            chosen = evenly_spaced(self.timesteps, schedule.steps)
        else:
            chosen = tuple(self.timesteps)
            wrong = [timestep for timestep in chosen if not 0 <= timestep <= last]
            if wrong or not chosen or len(set(chosen)) < len(chosen):
                found = f"{wrong[0]} among them" if wrong else repr(self.timesteps)
                raise SpecError(
                    f"model.options.timesteps: found {found}; accepted: timesteps from 0 to {last:,}, each once."
                )
        for name in ("noises", "copies_per_call"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SpecError(f"model.options.{name}: found {value}; accepted: 1 or more.")
        return Copies(seed=seed, timesteps=chosen, noises=self.noises)

    def preparation(self) -> Preparation:
        """Return what is done to every image before it is kept.

        Raises
        ------
        SpecError
            If a size or a number of channels is none.
        """
        return resolve_preparation(self.size, self.channels)
