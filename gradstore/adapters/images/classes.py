"""From the labels of a source to the numbers of a model's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradstore.adapters.images.entries import Entry
from gradstore.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Which output of the model stands for which label.

    ``names`` are the classes in the order of the outputs; None where labels are the numbers of the outputs themselves.
    """

    names: tuple[str, ...] | None

    def number(self, entry: Entry, where: str) -> int:
        """Return the number of an image's class.

        Raises
        ------
        DataError
            If the image has no label, or one that is no class.
        """
        if entry.label is None:
            raise DataError(f"{where}: {entry.image_id} has no label. Give it one, or take it out of the source.")
        if isinstance(entry.label, str):
            if self.names is None or entry.label not in self.names:
                raise DataError(
                    f"{where}: the label of {entry.image_id} is {entry.label!r}, which is none of the classes: "
                    f"{'numbers' if self.names is None else ', '.join(self.names[:10])}. Mend model.options.classes."
                )
            return self.names.index(entry.label)
        if entry.label < 0 or (self.names is not None and entry.label >= len(self.names)):
            raise DataError(
                f"{where}: the label of {entry.image_id} is {entry.label}; classes are numbered from 0"
                f"{'' if self.names is None else f' to {len(self.names) - 1}'}."
            )
        return entry.label

    def name(self, number: int) -> str:
        """Return what a person calls a class."""
        return str(number) if self.names is None else self.names[number]


def resolve_classes(
    entries: Sequence[Sequence[Entry]],
    written: Mapping[str, tuple[str, ...] | None],
    *,
    declared: Sequence[str] | None,
    learned: Sequence[str] | None,
) -> Classes:
    """Return one order of the classes for all sources.

    It is, the first that there is: what run.toml declares; the order that the model was trained with, where it knows every
    name; the numbers themselves, where labels are numbers; the order that the sources give; the names, sorted.

    Parameters
    ----------
    entries
        Of every source.
    written
        The order of the classes that a source itself gives, or None, by where run.toml names the source.
    declared
        ``model.options.classes``.
    learned
        The names that come with the model.

    Raises
    ------
    DataError
        If some labels are numbers and others names, or two sources give different orders.
    """
    if declared is not None:
        return Classes(names=tuple(declared))
    found = {entry.label for listed in entries for entry in listed if entry.label is not None}
    names = {label for label in found if isinstance(label, str)}
    if names and len(names) < len(found):
        number = next(label for label in found if not isinstance(label, str))
        raise DataError(
            f"data: some labels are names ({min(names)!r}) and others numbers ({number}). Use one kind in all splits, or "
            "declare the names in the order of the numbers: model.options.classes."
        )
    if not names:
        return Classes(names=None)
    if learned is not None and names <= set(learned):
        return Classes(names=tuple(learned))
    orders = {order: source for source, order in written.items() if order is not None}
    if len(orders) > 1:
        (first, one), (second, other), *_ = orders.items()
        raise DataError(
            f"{one}.source numbers its classes {', '.join(first[:5])}..., {other}.source {', '.join(second[:5])}... Declare the "
            "model's order: model.options.classes."
        )
    if orders and names <= set(order := next(iter(orders))):
        return Classes(names=order)
    return Classes(names=tuple(sorted(names)))
