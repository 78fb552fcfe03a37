"""What features cost: ratios to an ordinary forward and backward pass of the same batches, in CPU seconds.

W1: GPT-2-small shape (12 layers of 768, vocabulary 50,257), 2 sequences of 512 tokens, its 48 block layers.
W2: 4 layers of 256, vocabulary 8,192, 2 batches of 16 sequences of 128 tokens, its 16 block layers.
The plain pass is of the same model, tokens and summed loss, with gradients of every weight. Plain and measured passes
alternate in one process on one thread; a ratio is the median over the rounds of each round's ratio.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.groups import partition
from gradstore.numerics.gradients import FeatureExtractor, supported_layers
from gradstore.numerics.outputs import token_cross_entropy
from gradstore.numerics.projection import Logra

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
    """One way to take features, the limit it must keep, and its name in runs/bench.json."""

    rank: int
    precision: str
    target: float

    def name(self, work: str) -> str:
        """Name of the row."""
        return f"featurize-{work}-r{self.rank}-{self.precision}"


MEASURED = {
    "w1": [
        Measured(rank=16, precision="float32", target=0.76),
        Measured(rank=64, precision="float32", target=0.79),
        Measured(rank=16, precision="bfloat16", target=0.30),
    ],
    "w2": [
        Measured(rank=16, precision="float32", target=0.80),
        Measured(rank=64, precision="float32", target=0.84),
    ],
}


def rows(*, rounds: int = 3) -> list[dict[str, Any]]:
    """Measure every row and return {name, ratio, target, better}, with the ratios of single rounds beside."""
    with _one_thread():
        return [row for work in WORKS for row in _rows_of_work(work, rounds)]


def _rows_of_work(name: str, rounds: int) -> list[dict[str, Any]]:
    work = WORKS[name]
    model, batches = work.model(), work.batches()
    passes: dict[str, Callable[[], None]] = {"plain": lambda: _plain(model, batches)}
    for measured in MEASURED[name]:
        passes[measured.name(name)] = _features(model, batches, measured)
    seconds = _alternate(passes, rounds)
    return [
        {
            "name": measured.name(name),
            "ratio": round(_ratio(seconds[measured.name(name)], seconds["plain"]), 3),
            "target": measured.target,
            "better": "lower",
            "rounds": [
                round(ours / plain, 3)
                for ours, plain in zip(seconds[measured.name(name)], seconds["plain"], strict=True)
            ],
            "plain_cpu_seconds": round(statistics.median(seconds["plain"]), 3),
        }
        for measured in MEASURED[name]
    ]


def _losses(model: nn.Module, tokens: Tensor) -> Tensor:
    return token_cross_entropy(model(input_ids=tokens).logits, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _plain(model: nn.Module, batches: list[Tensor]) -> None:
    for tokens in batches:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(_losses(model, tokens).sum())
    model.zero_grad(set_to_none=True)


def _features(model: nn.Module, batches: list[Tensor], measured: Measured) -> Callable[[], None]:
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    groups = partition(supported_layers(model), parameters, heads=("lm_head",)).groups
    extractor = FeatureExtractor(model, groups, Logra(rank=measured.rank), seed=0)
    halved = measured.precision == "bfloat16"

    def extract() -> None:
        for tokens in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=halved):
                extractor(lambda tokens=tokens: _losses(model, tokens))  # type: ignore[misc]

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
