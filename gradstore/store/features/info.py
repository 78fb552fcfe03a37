"""What a feature set is: its rows, its blocks, its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from gradstore.errors import SpecError
from gradstore.spec import SET_FOLDERS
from gradstore.store.blocks import ObjectEntry
from gradstore.store.codecs import plain, require_types
from gradstore.store.compression import COMPRESSIONS
from gradstore.store.contract import require_equal
from gradstore.store.dtypes import DTYPES, DtypeName, is_scale
from gradstore.store.layout import (
    LONE_MEMBER,
    SCALES_FOLDER,
    ArrayLayout,
    RowBlocks,
    check_name,
    group_array,
    set_folder,
)

RESTORE: Final = "Restore the data and settings that it was made with, or choose another run.store."


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePart:
    """What some of a group's features are: the matrix [r_o, r_i] of one of its parts, row by row, or factors of it.

    Attributes
    ----------
    part
        The parameter, and the rows and columns of its canonical matrix.
    start
        First of its features.
    shape
        (r_o, r_i).
    factors
        c, where the features are factors of the matrix: u [c, r_o], then v [c, r_i]; else None.
    """

    part: str
    start: int
    shape: tuple[int, int]
    factors: int | None = None

    @property
    def features(self) -> int:
        """How many they are."""
        rows, columns = self.shape
        return rows * columns if self.factors is None else self.factors * (rows + columns)


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
        Power of two that stored float16 values are multiplied by; 1.0 for other types.
    depth, function
        The group's place in the model, as in ParameterGroup.
    parts
        The matrices that the features are made of; none where a projection mixes a group's parameters.
    """

    name: str
    features: int
    scale: float
    depth: int | None
    function: str
    parts: tuple[FeaturePart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetInfo(RowBlocks):
    """A feature set: the features of one data split.

    The number of examples, ``arrays`` (but for their scales), ``members`` and ``data_hash`` say what the set is and are
    compared when it is created again. ``block_rows``, ``dtype``, ``compression``, the scales and ``recorded`` say how
    it was made; they are fixed by the first creation and never compared.

    Attributes
    ----------
    name
        Name of the set: train, learn, eval.
    rows
        Length of its arrays: examples and gaps.
    block_rows
        Rows of a block, the last of which may be shorter.
    gaps
        Rows that belong to no example, as in `RowBlocks`.
    dtype
        Stored type of the features.
    arrays
        One for each parameter group, in the order of the groups.
    data_hash
        Hash of the examples, in order.
    members
        Models or checkpoints whose features the set holds, each under its name; a lone one is m0.
    compression
        How the features are compressed: a name in COMPRESSIONS.
    recorded
        Token budget, precision, compute threads and the like.
    erased
        Rows whose example was erased, ascending.
    remaining_hash
        Where rows are erased, the hash of the examples that are left: data without the erased ones is the set's too.

    Raises
    ------
    SpecError
        If the name cannot be a folder's, or a size, type, scale or member is not one that the format has.
    """

    name: str
    dtype: DtypeName
    arrays: tuple[FeatureArray, ...]
    data_hash: str
    members: tuple[str, ...] = (LONE_MEMBER,)
    compression: str = "none"
    recorded: Mapping[str, Any] = field(default_factory=dict)
    erased: tuple[int, ...] = ()
    remaining_hash: str | None = None

    def __post_init__(self) -> None:
        check_name("feature set", self.name)
        where = f"feature set {self.name}"
        if self.rows < 0 or self.block_rows < 1:
            raise SpecError(
                f"{where}: found {self.rows} rows in blocks of {self.block_rows}; blocks need at least one."
            )
        for key, value, accepted in (("dtype", self.dtype, DTYPES), ("compression", self.compression, COMPRESSIONS)):
            if value not in accepted:
                raise SpecError(f"{where}: {key}: found {value!r}; accepted: {', '.join(accepted)}.")
        if not self.members or len(set(self.members)) < len(self.members):
            raise SpecError(f"{where}: members: found {self.members}; accepted: one name or more, each of its own.")
        for member in self.members:
            check_name("member", member)
            if member in SET_FOLDERS:
                raise SpecError(f"{where}: members: found {member!r}, which is another folder's name. Choose another.")
        if len({array.name for array in self.arrays}) < len(self.arrays):
            raise SpecError(f"{where}: two arrays have one name; each parameter group needs its own.")
        for array in self.arrays:
            self._check_scale(f"{where}: scale of {array.name}", array.scale)

    def _check_scale(self, where: str, scale: float) -> None:
        scaled = DTYPES[self.dtype].scaled == "array"
        if (scaled and not is_scale(scale)) or (not scaled and scale != 1.0):
            accepted = "a power of two from 2^-126 to 2^126" if scaled else "1.0"
            raise SpecError(f"{where}: found {scale}; accepted for {self.dtype}: {accepted}.")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features as they are stored, of one member."""
        return DTYPES[self.dtype].item_bytes * sum(array.features for array in self.arrays)

    @property
    def folder(self) -> str:
        """Folder of the set in the store."""
        return set_folder(self.name)

    def array_path(self, member: str, name: str) -> str:
        """Path, inside the set, of a member's array of a group."""
        return group_array(member, name)

    def array_layout(self, array: FeatureArray) -> ArrayLayout:
        """Layout of a group's array: [rows, features] in chunks of a block."""
        attributes: dict[str, Any] = {"group": array.name, "depth": array.depth, "function": array.function}
        if array.parts:
            attributes["parts"] = plain([asdict(part) for part in array.parts])
        dtype = DTYPES[self.dtype]
        return ArrayLayout(
            shape=(self.rows, array.features),
            chunk_shape=(self.block_rows, array.features),
            dtype=dtype.zarr_dtype,
            dimension_names=("example", f"feature:{array.name}"),
            attributes=attributes | dtype.attributes(array.scale),
            fill_value=dtype.fill_value,
            compression=self.compression,
        )

    def scales_path(self, member: str) -> str:
        """Path, inside the set, of the scales of a member's rows."""
        return f"{SCALES_FOLDER}/{member}"

    def scales_layout(self) -> ArrayLayout | None:
        """Layout of the scales [rows, groups] of rows in every group, in chunks of a block; None if rows have none."""
        if DTYPES[self.dtype].scaled != "row":
            return None
        names = [array.name for array in self.arrays]
        return ArrayLayout(
            shape=(self.rows, len(names)),
            chunk_shape=(self.block_rows, len(names)),
            dtype="float32",
            dimension_names=("example", "group"),
            attributes={"groups": names},
        )

    def layouts(self, member: str) -> dict[str, ArrayLayout]:
        """Layout, by path inside the set, of every array of a member: of each group, and of the scales of its rows."""
        found = {self.array_path(member, array.name): self.array_layout(array) for array in self.arrays}
        scales = self.scales_layout()
        return found if scales is None else {**found, self.scales_path(member): scales}

    def erased_in(self, block: int) -> list[int]:
        """Erased rows of a block, counted from its first."""
        start, stop = self.block_range(block)
        return [row - start for row in self.erased if start <= row < stop]

    def appended(self, examples: int, hash_of_data: str, remaining_hash: str | None) -> SetInfo:
        """Return the set with more examples, from the next multiple of ``block_rows`` on, and its hashes with them."""
        first = self.num_blocks * self.block_rows
        gaps = self.gaps if first == self.rows else (*self.gaps, (self.rows, first))
        return replace(self, rows=first + examples, gaps=gaps, data_hash=hash_of_data, remaining_hash=remaining_hash)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        value: dict[str, Any] = plain(asdict(self))
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SetInfo:
        """Return the set that `to_json` described.

        Raises
        ------
        MALFORMED
            If it is of another shape.
        """
        require_types(value, _TYPES)
        for key, rows in (("erased", value["erased"]), ("gaps", [row for gap in value["gaps"] for row in gap])):
            if not all(type(row) is int for row in rows):
                raise TypeError(f"{key} is {value[key]!r:.60}, not rows")
        own = {
            "arrays": tuple(_array_from_json(array) for array in value["arrays"]),
            "members": tuple(value["members"]),
            "gaps": tuple((start, stop) for start, stop in value["gaps"]),
            "erased": tuple(value["erased"]),
        }
        return cls(**{**value, **own})

    def lacks_the_erased(self, asked: SetInfo) -> bool:
        """Whether a set that is asked for is of the examples that are left when the erased ones are."""
        left = self.num_examples - len(self.erased)
        return bool(self.erased) and (asked.num_examples, asked.data_hash) == (left, self.remaining_hash)

    def require_same(self, asked: SetInfo, where: str, *, remedy: str = RESTORE) -> None:
        """Compare what the set is with what is asked for: its examples with or without those that were erased.

        Raises
        ------
        ContractError
            With one line for each field that differs.
        """
        wanted = _identity(asked)
        if self.lacks_the_erased(asked):
            wanted |= {"examples": self.num_examples, "data_hash": self.data_hash}
        require_equal(where, _identity(self), wanted, remedy=remedy)


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("rows", "block_rows"), (int,)),
    **dict.fromkeys(("name", "dtype", "data_hash", "compression"), (str,)),
    **dict.fromkeys(("arrays", "members", "gaps", "erased"), (list,)),
    "recorded": (dict,),
    "remaining_hash": (str, type(None)),
}
_MOST_FEATURES = 2**40
_ARRAY_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "function"), (str,)),
    "features": (int,),
    "scale": (float, int),
    "depth": (int, type(None)),
    "parts": (list,),
}


def _array_from_json(value: Mapping[str, Any]) -> FeatureArray:
    require_types(value, _ARRAY_TYPES)
    if not 1 <= value["features"] <= _MOST_FEATURES:
        raise ValueError(f"{value['name']!r:.60} has {value['features']} features")
    parts = tuple(FeaturePart(**{**part, "shape": tuple(part["shape"])}) for part in value["parts"])
    return FeatureArray(**{**value, "parts": parts})


def _identity(info: SetInfo) -> dict[str, Any]:
    arrays = {array.name: asdict(replace(array, scale=1.0)) for array in info.arrays}
    order = [array.name for array in info.arrays]
    value = {
        "examples": info.num_examples,
        "data_hash": info.data_hash,
        "members": info.members,
        "arrays": arrays,
        "order": order,
    }
    return dict(plain(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The committed blocks of a feature set's member at one moment: (block, generation), in order."""

    feature_set: str
    member: str
    blocks: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, to be kept among the settings of what is made from the set."""
        value: dict[str, Any] = plain(asdict(self))
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SetVersion:
    """One version of a feature set: as it was created, or as an append or an erasure made it.

    Attributes
    ----------
    number
        0 as created, one more with each append or erasure; the highest counts.
    info
        What the set is in it.
    inputs
        What the creator wrote of its inputs, by their paths in the set.
    """

    number: int
    info: SetInfo
    inputs: Mapping[str, ObjectEntry]

    def input_paths(self) -> dict[int, str]:
        """Path, in the set, of the inputs of every block."""
        return {int(path.partition("/")[2].partition(".")[0]): path for path in self.inputs}
