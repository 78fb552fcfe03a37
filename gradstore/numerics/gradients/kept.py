"""What a layer was called with, kept until the backward pass without a copy."""

from torch import Tensor

from gradstore.errors import SpecError


class Kept:
    """A module's input, kept as it is: whoever writes into it in between is found out."""

    def __init__(self, name: str, value: Tensor) -> None:
        self._name = name
        self._value = value
        self._version = value._version

    def value(self) -> Tensor:
        """The input; SpecError if it was written into."""
        if self._value._version != self._version:
            raise SpecError(
                f"{self._name}: its input is changed in place after the call, so its gradient cannot be taken, nor by "
                "training. Mend the model, or leave it out with features.groups.exclude."
            )
        return self._value


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether one is the other, or a view of it or of what it is a view of."""
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
