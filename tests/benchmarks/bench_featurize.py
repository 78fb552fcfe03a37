"""What features cost: ratios to an ordinary forward and backward pass of the same batches, in CPU seconds.

W1: GPT-2-small shape (12 layers of 768, vocabulary 50,257), 2 sequences of 512 tokens, its 48 block layers.
W2: 4 layers of 256, vocabulary 8,192, 2 batches of 16 sequences of 128 tokens, its 16 block layers.
The plain pass is of the same model, tokens and summed loss, with gradients of every weight. Plain and measured passes
alternate in one process on one thread; a ratio is the median over the rounds of each round's ratio.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.groups import Grouping, partition
from gradstore.numerics.gradients import FeatureExtractor, model_parameters
from gradstore.numerics.outputs import token_cross_entropy
from gradstore.numerics.projection import Dense, Logra, Projection

SEED_OF_MODEL, SEED_OF_DATA = 1234, 4321


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's shape and the tokens that go through it in one round."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    length: int
    batch: int
    sequences: int

    def model(self) -> nn.Module:
        """Build the GPT-2 of this shape with random weights."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(SEED_OF_MODEL)
        config = GPT2Config(
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.heads,
            vocab_size=self.vocabulary,
            n_positions=self.context,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: nn.Module = GPT2LMHeadModel(config).eval()
        return model

    def batches(self) -> list[Tensor]:
        """Draw the tokens [batch, length] of one round."""
        generator = torch.Generator().manual_seed(SEED_OF_DATA)
        tokens = torch.randint(0, self.vocabulary, (self.sequences, self.length), generator=generator)
        return list(torch.split(tokens, self.batch))


WORKS = {
    "w1": Work(layers=12, width=768, heads=12, vocabulary=50257, context=1024, length=512, batch=2, sequences=2),
    "w2": Work(layers=4, width=256, heads=4, vocabulary=8192, context=256, length=128, batch=16, sequences=32),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to take features, the limit it must keep, its name in runs/bench.json, and what peers were seen to reach."""

    name: str
    projection: Projection
    target: float
    precision: str = "float32"
    peers: Mapping[str, float] = field(default_factory=dict)


MEASURED = {
    "w1": [
        Measured(
            name="featurize-w1-r16-float32",
            projection=Logra(rank=16),
            target=0.76,
            peers={
                "LogIX 0.1.1": 0.75,
                "dattri 0.3.0": 0.84,
                "bergson 2.5.1": 0.85,
                "forward and input gradients": 0.73,
            },
        ),
        Measured(
            name="featurize-w1-r64-float32",
            projection=Logra(rank=64),
            target=0.79,
            peers={"LogIX 0.1.1": 0.78, "bergson 2.5.1": 0.84},
        ),
        Measured(
            name="featurize-w1-r16-bfloat16",
            projection=Logra(rank=16),
            precision="bfloat16",
            target=0.30,
            peers={"plain in bfloat16": 0.33},
        ),
    ],
    "w2": [
        Measured(
            name="featurize-w2-r16-float32",
            projection=Logra(rank=16),
            target=0.80,
            peers={
                "LogIX 0.1.1": 0.81,
                "dattri 0.3.0": 0.91,
                "bergson 2.5.1": 0.88,
                "forward and input gradients": 0.79,
            },
        ),
        Measured(
            name="featurize-w2-r64-float32",
            projection=Logra(rank=64),
            target=0.84,
            peers={"LogIX 0.1.1": 1.10, "bergson 2.5.1": 0.93},
        ),
        Measured(
            name="dense-2048",
            projection=Dense(features=2048),
            target=5.0,
            peers={"the product alone": 3.4, "TRAK's CPU projector": 27.0},
        ),
    ],
}
MEMORY_TARGET = 1.05


def rows(*, rounds: int = 3) -> list[dict[str, Any]]:
    """Measure every row and return {name, ratio, target, better}, with the ratios of single rounds beside."""
    with _one_thread():
        timed = [row for work in WORKS for row in _rows_of_work(work, rounds)]
    return [*timed, _memory_row()]


def _rows_of_work(name: str, rounds: int) -> list[dict[str, Any]]:
    work = WORKS[name]
    model, batches = work.model(), work.batches()
    passes: dict[str, Callable[[], None]] = {"plain": lambda: _plain(model, batches)}
    for measured in MEASURED[name]:
        passes[measured.name] = _features(model, batches, measured)
    seconds = _alternate(passes, rounds)
    return [
        {
            "name": measured.name,
            "ratio": round(_ratio(seconds[measured.name], seconds["plain"]), 3),
            "target": measured.target,
            "better": "lower",
            "rounds": [
                round(ours / plain, 3) for ours, plain in zip(seconds[measured.name], seconds["plain"], strict=True)
            ],
            "plain_cpu_seconds": round(statistics.median(seconds["plain"]), 3),
            "peers": dict(measured.peers),
        }
        for measured in MEASURED[name]
    ]


def _memory_row() -> dict[str, Any]:
    """Peak resident memory of a process that takes features of one batch of W1, against one that trains on it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        plain, ours = (pool.submit(_peak_bytes, features=features).result() for features in (False, True))
    return {
        "name": "featurize-w1-memory",
        "ratio": round(ours / plain, 3),
        "target": MEMORY_TARGET,
        "better": "lower",
        "bytes": {"features": ours, "plain": plain},
    }


def _peak_bytes(*, features: bool) -> int:
    torch.set_num_threads(1)
    work = WORKS["w1"]
    model, batches = work.model(), work.batches()
    for _ in range(2):
        if features:
            _features(model, batches, MEASURED["w1"][0])()
        else:
            _plain(model, batches)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _losses(model: nn.Module, tokens: Tensor) -> Tensor:
    return token_cross_entropy(model(input_ids=tokens).logits, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _plain(model: nn.Module, batches: list[Tensor]) -> None:
    for tokens in batches:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(_losses(model, tokens).sum())
    model.zero_grad(set_to_none=True)


def _features(model: nn.Module, batches: list[Tensor], measured: Measured) -> Callable[[], None]:
    groups = partition(model_parameters(model, ("lm_head",)), Grouping()).groups
    extractor = FeatureExtractor(model, groups, measured.projection, seed=0)
    halved = measured.precision == "bfloat16"

    def extract() -> None:
        for tokens in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=halved):
                extractor(lambda tokens=tokens: _losses(model, tokens), examples=len(tokens))  # type: ignore[misc]

    return extract


def _alternate(passes: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every pass in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for count in range(rounds + 1):
        for name, run in passes.items():
            gc.collect()
            started = time.process_time()
            run()
            if count:
                seconds[name].append(time.process_time() - started)
    return seconds


def _ratio(ours: list[float], plain: list[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(ours, plain, strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """CPU seconds of one thread stay meaningful on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
