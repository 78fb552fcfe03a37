"""Projections: from a parameter's per-example gradient to the features that are stored. One file per kind."""

from gradstore.numerics.projection.adam import AdamProjector
from gradstore.numerics.projection.components import SecondMoments
from gradstore.numerics.projection.dense import Dense
from gradstore.numerics.projection.identity import Identity
from gradstore.numerics.projection.logra import Logra
from gradstore.numerics.projection.lorif import Lorif
from gradstore.numerics.projection.protocol import Finishing, Matrices, Placed, Projection, Projector, TwoSided
from gradstore.numerics.projection.sjlt import FactSjlt, Sjlt

PROJECTIONS: dict[str, type[Projection]] = {
    "identity": Identity,
    "logra": Logra,
    "dense": Dense,
    "sjlt": Sjlt,
    "fact-sjlt": FactSjlt,
    "lorif": Lorif,
}

__all__ = [
    "PROJECTIONS",
    "AdamProjector",
    "Dense",
    "FactSjlt",
    "Finishing",
    "Identity",
    "Logra",
    "Lorif",
    "Matrices",
    "Placed",
    "Projection",
    "Projector",
    "SecondMoments",
    "Sjlt",
    "TwoSided",
]
