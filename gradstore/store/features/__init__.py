"""Feature stores and feature sets: the features of every example, block by block."""

from gradstore.store.features.erasure import erase_rows, finish_erasure, is_finished
from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.feature_store import FeatureStore
from gradstore.store.features.info import FeatureArray, FeaturePart, SetInfo, SetVersion, Snapshot
from gradstore.store.features.inputs import blanked
from gradstore.store.features.kept import KeepingReader, KeptBlocks, Room
from gradstore.store.features.reader import BlockReader, Piece

__all__ = [
    "BlockReader",
    "FeatureArray",
    "FeaturePart",
    "FeatureSet",
    "FeatureStore",
    "KeepingReader",
    "KeptBlocks",
    "Piece",
    "Room",
    "SetInfo",
    "SetVersion",
    "Snapshot",
    "blanked",
    "erase_rows",
    "finish_erasure",
    "is_finished",
]
