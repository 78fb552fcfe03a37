"""run: the whole path, stage after stage; report follows once the cluster is gone."""

from __future__ import annotations

from collections.abc import Callable

from gradstore.cluster import Engine
from gradstore.errors import NotReadyError
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn, refuse_other_weights
from gradstore.stages.progress import Progress
from gradstore.stages.score import score
from gradstore.stages.weights import read_weights
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.backend import Storage, open_storage
from gradstore.store.features import FeatureStore

Stage = Callable[[RunSpec, Engine, Progress], None]

STAGES = (featurize, build_kernel, contribute, learn, score)


def stages_of(spec: RunSpec) -> tuple[Stage, ...]:
    """Return the stages that a run goes through, if those that come last can use the weights that the store has.

    Where scores alone are made nothing is learned.

    Raises
    ------
    NotReadyError
        If weights that scores are to be made under have not been learned: this run does not.
    ContractError
        If these are of other groups, or weights of the name that the run learns were learned otherwise.
    """
    stages = tuple(stage for stage in STAGES if stage != learn or spec.contribute.mode != "scores")
    # Before work starts: else this is told hours later, when the stage begins that uses them.
    if learn in stages:
        refuse_other_weights(spec, open_storage(spec.run.store))
    targets = [target for swept in spec.sweep() for target in swept.learn_targets()] if learn in stages else []
    learned = {name for _, name in targets}
    asked = [*spec.score.weights, *filter(None, [spec.contribute.weights])]
    given = set(asked) - learned
    for name in sorted(given):
        _refuse_given_weights(open_storage(spec.run.store), name)
    return stages


def _refuse_given_weights(storage: Storage, name: str) -> None:
    # Where there is no store yet there are no weights either, and featurize brings none.
    if WeightsArtifact.find_named(storage, name) is None:
        raise NotReadyError(
            f"{storage.url}/weights/{name}: there is no such artifact, and this run does not learn it. Bring it by `gradstore "
            "transfer`, or name weights that are there in contribute.weights or score.weights."
        )
    read_weights(FeatureStore.open(storage), name)
