"""Feature stores and feature sets: the features of every example, block by block."""

from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.feature_store import FeatureStore
from gradstore.store.features.info import FeatureArray, FeaturePart, SetInfo, Snapshot

__all__ = ["FeatureArray", "FeaturePart", "FeatureSet", "FeatureStore", "SetInfo", "Snapshot"]
