"""The examples of a diffusion model: images of a source, and images that it made itself, with what they went through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from gradstore.adapters.diffusion.sampler import Sample, Sampling, classes_in_turn, samples, to_pixels
from gradstore.adapters.images.classes import Classes
from gradstore.adapters.images.splits import CLASS, IMAGE, PIXELS_PER_TOKEN
from gradstore.errors import DataError
from gradstore.spec import SplitSection, key_of, role_of
from gradstore.store.examples import Example, hash_inputs

if TYPE_CHECKING:
    from torch import Tensor

PATH: Final = "trajectory"
"""The noisy images that a sample went through: float32 [S, C, H, W]."""
TIMES: Final = "timesteps"
"""Their timesteps: int64 [S]."""
LAST: Final = "sample"
"""The image that came of them, before it was rounded to bytes: float32 [C, H, W] in [-1, 1]."""

Predict = Callable[["Tensor", int, Sequence[int] | None], "Tensor"]
"""The predicted noise of images [n, C, H, W] at one timestep, of these classes if the model takes any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A split whose images the model makes.

    Attributes
    ----------
    name
        Of the split.
    section
        What run.toml says of it.
    numbers
        Numbers of its first sample and after its last.
    sampling
        How they are made.
    """

    name: str
    section: SplitSection
    numbers: tuple[int, int]
    sampling: Sampling


def sampled_split(
    predict: Predict, levels: np.ndarray, wanted: Wanted, train: Sequence[Example], classes: Classes | None
) -> list[Example]:
    """Return the examples of a split whose images the model makes, of the shape and the classes of the train images.

    Raises
    ------
    SpecError
        If a class that is asked for is none.
    DataError
        If the model makes something that is no number.
    """
    turns: list[int] | None = None
    if classes is not None:
        found = [int(example.inputs[CLASS]) for example in train]
        turns = classes_in_turn(wanted.sampling, found, classes, key_of(wanted.name))

    def chosen(number: int) -> int | None:
        return None if turns is None else turns[number % len(turns)]

    def predicted(x: Tensor, timestep: int, numbers: Sequence[int]) -> Tensor:
        return predict(x, timestep, None if turns is None else [turns[number % len(turns)] for number in numbers])

    made = samples(predicted, wanted.sampling, levels, wanted.numbers, train[0].inputs[IMAGE].shape)
    return [_example(sample, wanted, chosen(sample.number), classes) for sample in made]


def _example(sample: Sample, wanted: Wanted, number: int | None, classes: Classes | None) -> Example:
    inputs: dict[str, np.ndarray] = {IMAGE: to_pixels(sample.image)}
    if number is not None:
        inputs[CLASS] = np.array(number, np.int64)
    if wanted.sampling.trajectory:
        inputs |= {PATH: sample.trajectory, TIMES: sample.timesteps, LAST: sample.image}
    return Example(
        example_id=f"sample-{wanted.sampling.seed}-{sample.number}",
        source=wanted.section.source,
        label=None if number is None or classes is None else classes.name(number),
        text="",
        content_hash=hash_inputs(inputs),
        size=1,
        inputs=inputs,
    )


def sized(example: Example, copies: int) -> Example:
    """Return an example with the tokens that it takes: 8 x 8 pixels of every copy that it is seen in are one."""
    height, width = example.inputs[IMAGE].shape[1:]
    return replace(example, size=max(1, copies * height * width // PIXELS_PER_TOKEN))


def refuse_equal_samples(made: Mapping[str, Sequence[Example]]) -> None:
    """Splits of samples have disjoint roles, as all splits have; a sample may be like a train image, which it may show.

    Raises
    ------
    DataError
        Naming two samples with the same pixels.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, examples in made.items():
        for example in examples:
            digest = hash_inputs({IMAGE: example.inputs[IMAGE]})
            other, its_sample = seen.setdefault(digest, (name, example.example_id))
            if role_of(other) != role_of(name):
                raise DataError(
                    f"{key_of(name)}: {example.example_id} has the pixels of {its_sample} in {key_of(other)}. The splits must not "
                    f"overlap: give {key_of(name)} another generate.seed, or both the same source, whose samples they share out."
                )
