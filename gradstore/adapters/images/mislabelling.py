"""Labels that are made wrong on purpose, so that it can be measured whether they are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradstore.adapters.images.classes import Classes
from gradstore.adapters.images.splits import CLASS, TRUE_CLASS
from gradstore.errors import DataError
from gradstore.numerics.generator import derive_key
from gradstore.store.examples import Example, hash_inputs


def mislabelled(examples: Sequence[Example], classes: Classes, share: float, seed: int) -> list[Example]:
    """Give a share of some examples another class, any of those that the examples have with equal probability.

    Each example is drawn for itself, by the seed and its id, so that more of them change none of the earlier ones; the share
    is that of the draw. The class that it had stays in the input ``true_class``, which no model sees.

    Raises
    ------
    DataError
        If the examples are of one class alone.
    """
    numbers = sorted({int(example.inputs[CLASS]) for example in examples})
    if len(numbers) < 2:
        raise DataError(
            f"model.options.mislabelled: found {share}, and all images of data.train are of the class {numbers[0]}; "
            "a wrong label is one of several."
        )
    return [_drawn(example, classes, numbers, share, seed) for example in examples]


def _drawn(example: Example, classes: Classes, numbers: Sequence[int], share: float, seed: int) -> Example:
    true = int(example.inputs[CLASS])
    drawn = derive_key(seed, "mislabelled", example.example_id)
    number = true
    if drawn / 2.0**128 < share:
        others = [other for other in numbers if other != true]
        number = others[derive_key(seed, "wrong class", example.example_id) % len(others)]
    inputs = {**example.inputs, CLASS: np.array(number, np.int64), TRUE_CLASS: np.array(true, np.int64)}
    return replace(example, inputs=inputs, label=classes.name(number), content_hash=hash_inputs(inputs))
