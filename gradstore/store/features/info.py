"""What a feature set is: its rows, its blocks, its arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from gradstore.errors import SpecError
from gradstore.store.codecs import plain
from gradstore.store.contract import require_equal
from gradstore.store.layout import LONE_MEMBER, ArrayLayout, RowBlocks, check_name, group_array, set_folder

RESTORE: Final = "Restore the data and settings that it was made with, or choose another run.store."


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureArray:
    """One parameter group's array in a feature set.

    Attributes
    ----------
    name
        The group.
    features
        Number of features k_j.
    scale
        Power of two that stored float16 values are multiplied by; 1.0 for float32.
    depth, function, out_features, in_features
        The group's place in the model and its gradient's shape, as in ParameterGroup.
    """

    name: str
    features: int
    scale: float
    depth: int | None
    function: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetInfo(RowBlocks):
    """A feature set: the features of one data split.

    ``rows``, ``arrays`` (but for their scales), ``members`` and ``data_hash`` say what the set is and are compared when it
    is created again. ``block_rows``, ``dtype``, the scales and ``recorded`` say how it was made; they are fixed by the
    first creation and never compared.

    Attributes
    ----------
    name
        Name of the set: train, learn, eval.
    rows
        Number of examples.
    block_rows
        Rows of a block, the last of which may be shorter.
    dtype
        Stored type of the features.
    arrays
        One for each parameter group, in the order of the groups.
    data_hash
        Hash of the examples, in order.
    members
        Models, checkpoints or timesteps whose features the set holds; this version writes a lone one, m0.
    recorded
        Token budget, precision, compute threads and the like.

    Raises
    ------
    SpecError
        If the name cannot be a folder's, or a size, type, scale or member is not one that the format has.
    """

    name: str
    dtype: Literal["float32", "float16"]
    arrays: tuple[FeatureArray, ...]
    data_hash: str
    members: tuple[str, ...] = (LONE_MEMBER,)
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("feature set", self.name)
        where = f"feature set {self.name}"
        if self.rows < 0 or self.block_rows < 1:
            raise SpecError(
                f"{where}: found {self.rows} rows in blocks of {self.block_rows}; blocks need at least one."
            )
        if self.dtype not in ("float32", "float16"):
            raise SpecError(f"{where}: dtype: found {self.dtype!r}; accepted: float32, float16.")
        if self.members != (LONE_MEMBER,):
            raise SpecError(f"{where}: members: found {self.members}; this version writes ({LONE_MEMBER!r},).")
        if len({array.name for array in self.arrays}) < len(self.arrays):
            raise SpecError(f"{where}: two arrays have one name; each parameter group needs its own.")
        for array in self.arrays:
            if math.frexp(array.scale)[0] != 0.5 or (self.dtype == "float32" and array.scale != 1.0):
                raise SpecError(
                    f"{where}: scale of {array.name}: found {array.scale}; accepted: 1.0 for float32, a power of two "
                    "for float16."
                )

    @property
    def folder(self) -> str:
        """Folder of the set in the store."""
        return set_folder(self.name)

    def array_path(self, name: str) -> str:
        """Path, inside the set, of a group's array."""
        return group_array(self.members[0], name)

    def array_layout(self, array: FeatureArray) -> ArrayLayout:
        """Layout of a group's array: [rows, features] in chunks of a block."""
        attributes: dict[str, Any] = {"group": array.name, "depth": array.depth, "function": array.function}
        if self.dtype == "float16":
            attributes["scale_factor"] = array.scale
        return ArrayLayout(
            shape=(self.rows, array.features),
            chunk_shape=(self.block_rows, array.features),
            dtype=self.dtype,
            dimension_names=("example", f"feature:{array.name}"),
            attributes=attributes,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        value: dict[str, Any] = plain(asdict(self))
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SetInfo:
        """Return the set that `to_json` described."""
        arrays = tuple(FeatureArray(**array) for array in value["arrays"])
        return cls(**{**value, "arrays": arrays, "members": tuple(value["members"])})

    def require_same(self, asked: SetInfo, where: str, *, remedy: str = RESTORE) -> None:
        """Compare what the set is with what is asked for.

        Raises
        ------
        ContractError
            With one line for each field that differs.
        """
        require_equal(where, _identity(self), _identity(asked), remedy=remedy)


def _identity(info: SetInfo) -> dict[str, Any]:
    arrays = {array.name: asdict(replace(array, scale=1.0)) for array in info.arrays}
    order = [array.name for array in info.arrays]
    value = {"rows": info.rows, "data_hash": info.data_hash, "members": info.members, "arrays": arrays, "order": order}
    return dict(plain(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The committed blocks of a feature set at one moment: (block, generation), in order."""

    feature_set: str
    blocks: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, to be kept among the settings of what is made from the set."""
        value: dict[str, Any] = plain(asdict(self))
        return value
