"""run: the whole path, stage after stage; report follows once the cluster is gone."""

from __future__ import annotations

from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.score import score

STAGES = (featurize, build_kernel, contribute, learn, score)
