"""What a module is called with, taken apart into single examples, and what it returns for each, put together again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradstore.errors import DataError, SpecError

# Largest distance, relative to its norm, of what a module returns for single examples from what it returns for all: rounding,
# in half precision too.
ROUNDING = 5e-2


def rows_of(item: Any, rows: slice, length: int) -> Any:
    """Rows of an argument that has them for every example, as the input has; of those in a tuple or list too."""
    if isinstance(item, Tensor):
        return item[rows] if item.dim() and item.shape[0] == length else item
    if type(item) in (tuple, list):
        return type(item)(rows_of(part, rows, length) for part in item)
    return item


def joined(name: str, outputs: Sequence[Any], whole: Any) -> Any:
    """The outputs of single examples as one, in the form that the module gave for all.

    Raises
    ------
    DataError
        If they are not what it gave for all, or not one behind the other.
    SpecError
        If they are no tensors.
    """
    if isinstance(whole, Tensor):
        return _joined_tensors(name, outputs, whole)
    if isinstance(whole, tuple | list):
        parts = [joined(name, part, like) for part, like in zip(zip(*outputs, strict=True), whole, strict=True)]
        # A named tuple takes its parts one by one.
        return type(whole)(*parts) if hasattr(whole, "_fields") else type(whole)(parts)
    if whole is None:
        return None
    raise SpecError(
        f"{name}: it returns {type(whole).__name__}; the gradients of a module of unknown kind can be taken if it returns "
        "tensors. Leave it out with features.groups.exclude."
    )


def _joined_tensors(name: str, outputs: Sequence[Tensor], whole: Tensor) -> Tensor:
    found = torch.cat(list(outputs)) if whole.dim() else torch.stack(list(outputs))
    # What is the same for all examples may be given once.
    shared = whole.dim() > 0 and whole.shape[0] == 1
    if found.shape[1:] != whole.shape[1:] or not (shared or found.shape == whole.shape):
        raise DataError(
            f"{name}: for single examples it returns {tuple(found.shape)} in all, for all at once {tuple(whole.shape)}, so it "
            "mixes them. Leave it out with features.groups.exclude."
        )
    if whole.is_floating_point():
        distance, norm = (found.detach() - whole.detach()).norm(), whole.detach().norm()
        if bool(distance > ROUNDING * norm * (len(found) / len(whole)) ** 0.5):
            raise DataError(
                f"{name}: for single examples it returns other values than for all at once, so it mixes them, or has them "
                "elsewhere than in its first dimension. Leave it out with features.groups.exclude."
            )
    return found
