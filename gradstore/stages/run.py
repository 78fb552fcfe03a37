"""run: the whole path, stage after stage; report follows once the cluster is gone."""

from __future__ import annotations

from collections.abc import Callable

from gradstore.cluster import Engine
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.score import score

Stage = Callable[[RunSpec, Engine, Progress], None]

STAGES = (featurize, build_kernel, contribute, learn, score)


def stages_of(spec: RunSpec) -> tuple[Stage, ...]:
    """Return the stages that a run goes through: where no C is kept nothing is learned, and ranked only by scores alone."""
    left_out: dict[str, tuple[Stage, ...]] = {"tensor": (), "scores": (learn,), "streamed": (learn, score)}
    return tuple(stage for stage in STAGES if stage not in left_out[spec.contribute.mode])
