"""RunSpec: what run.toml says, as frozen values, and the errors for what it may not say.

Paths: ``run.store`` and ``evaluate.lds.store`` are relative to the working directory, as on the command line; every other relative
path is relative to the folder of run.toml, so that a pipeline's folder can be copied as a whole, and where nothing is there to
the working directory too, where what earlier commands made may be.
"""

from gradstore.spec.cluster import ClusterSection
from gradstore.spec.data import SPLITS, DataSection, SplitSection, key_of, role_of
from gradstore.spec.kinds import content_hash, differences, resolve_kind
from gradstore.spec.reading import parse_spec, read_spec
from gradstore.spec.sections import (
    MEAN_MEMBER,
    SET_FOLDERS,
    FeaturesSection,
    KernelSection,
    ModelSection,
    RunSpec,
)

__all__ = [
    "MEAN_MEMBER",
    "SET_FOLDERS",
    "SPLITS",
    "ClusterSection",
    "DataSection",
    "FeaturesSection",
    "KernelSection",
    "ModelSection",
    "RunSpec",
    "SplitSection",
    "content_hash",
    "differences",
    "key_of",
    "parse_spec",
    "read_spec",
    "resolve_kind",
    "role_of",
]
