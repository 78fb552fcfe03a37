"""What the plan says of memory, against real tasks of a store of some size, each in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.plan import make_plan
from gradstore.plan.memory import PROCESS_BYTES
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute, contribute_span
from gradstore.stages.featurize import featurize
from gradstore.stages.featurize.block import featurize_blocks
from gradstore.stages.kernel import build_bundle, build_kernel
from gradstore.stages.progress import Progress
from gradstore.stages.score.tail_patch import patch_query, tail_patches
from tests.memory.held import HoldingEngine, Peak
from tests.models import VOCABULARY, tiny_tokenizer
from tests.runs import make_run, write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

CHANGES: dict[str, dict[str, Any]] = {
    "data": {"deduplicate": False},
    "data.train": {"rows": 160},
    "data.learn": {"rows": 80},
    "data.eval": {"rows": 80},
    "features": {"projection": {"kind": "logra", "rank": 32}, "block_rows": 80, "token_budget": 1920},
    "score.tail_patch": {"queries": 1, "k": 80},
}
# Where a task's peak passes these multiples the plan would refuse what fits.
TOO_HIGH = 4
# Code that only a task touches, allocator arenas, and stacks of threads.
SLACK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A stage: memory of a task as planned, of which the model's weights take some, and as measured."""

    planned: int
    weights: int
    peak: Peak


def make_model(folder: Path) -> None:
    """Save a Llama of 20 million parameters, 80 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Measured]:
    """What is known of each stage."""
    folder = tmp_path_factory.mktemp("memory")
    make_model(folder / "model")
    write_corpus(folder / "texts.jsonl", 330)
    spec = read_spec(make_run(folder, str(folder / "store"), CHANGES))
    # The spectra of all groups would take a minute, so C is built with a kernel that needs none.
    identity = spec.model_copy(update={"kernel": spec.kernel.model_copy(update={"kind": "identity", "options": {}})})
    identity = identity.model_copy(update={"kernel": identity.kernel.model_copy(update={"name": "plain"})})
    quiet = Progress(quiet=True)

    def tail_patch(spec: RunSpec, engine: Engine, progress: Progress) -> None:
        rows = [list(range(spec.score.tail_patch.k))]
        tail_patches(spec, engine, progress, {"first": rows}, [0])

    def contribute_from_identity(spec: RunSpec, engine: Engine, progress: Progress) -> None:
        build_kernel(spec, engine, progress)
        contribute(spec, engine, progress)

    found = {}
    cases: list[tuple[str, RunSpec, Callable[..., None], Callable[..., Any], bool]] = [
        ("featurize", spec, featurize, featurize_blocks, True),
        ("kernel", spec, build_kernel, build_bundle, False),
        ("contribute", identity, contribute_from_identity, contribute_span, False),
        ("score", spec, tail_patch, patch_query, False),
    ]
    for name, of, stage, task, finish in cases:
        engine = HoldingEngine(task, finish=finish)
        stage(of, cast(Engine, engine), quiet)
        assert engine.peak is not None
        plan = make_plan(of)
        planned = next(planned.task_memory_bytes for planned in plan.stages if planned.name == name)
        found[name] = Measured(planned=planned, weights=4 * plan.partition.total_parameters, peak=engine.peak)
    return found


@pytest.mark.parametrize("stage", ["featurize", "kernel", "contribute", "score"])
def test_a_task_takes_no_more_memory_than_planned(measured: Mapping[str, Measured], stage: str) -> None:
    planned, peak = measured[stage].planned, measured[stage].peak
    print(f"{stage}: planned {planned >> 20} MiB, measured {peak.highest >> 20} MiB, {peak.before >> 20} before")
    assert peak.highest <= planned <= TOO_HIGH * peak.highest


@pytest.mark.parametrize("stage", ["kernel", "contribute"])
def test_what_a_task_adds_to_its_process_is_what_the_plan_adds_to_it(
    measured: Mapping[str, Measured], stage: str
) -> None:
    # These tasks need no model; the plan counts it because a worker of `gradstore run` still has it from featurize.
    found = measured[stage]
    added = found.peak.added
    assert 4 * added >= found.planned - PROCESS_BYTES - found.weights >= added - SLACK_BYTES
