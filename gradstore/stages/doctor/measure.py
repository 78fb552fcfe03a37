"""How long a pass takes, and how much memory it holds at its highest."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import psutil

from gradstore.stages.doctor.exact import thawed

if TYPE_CHECKING:
    from gradstore.stages.loading import Loaded
    from gradstore.store.examples import Example

SAMPLING_SECONDS = 0.002
# A pass is repeated until it is clear how long it takes, the first time not counted.
MIN_PASSES = 2
MAX_PASSES = 6
ENOUGH_SECONDS = 4.0


class PeakMemory:
    """The highest memory within a ``with`` block: of the process, and of the CUDA device where that computes."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.process_bytes = 0
        self.device_bytes: int | None = None

    def __enter__(self) -> Self:
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._look()
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._sampler.join()
        self._look()
        if self._on_cuda:
            import torch

            self.device_bytes = torch.cuda.max_memory_allocated()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLING_SECONDS):
            self._look()

    def _look(self) -> None:
        self.process_bytes = max(self.process_bytes, self._process.memory_info().rss)


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Median seconds of a piece of work, after a first time that is not counted."""
    found: list[float] = []
    while len(found) < MIN_PASSES or (len(found) < MAX_PASSES and sum(found) < ENOUGH_SECONDS):
        found.append(_seconds(work, device))
    return statistics.median(found[1:])


def _seconds(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain_pass(loaded: Loaded, examples: Sequence[Example]) -> None:
    """Do the forward and backward pass of a batch that training would do, in the run's precision."""
    import torch

    tensors = [tensor for tensor in loaded.model.parameters() if tensor.requires_grad]
    with torch.enable_grad(), thawed(tensors):
        output = loaded.outputs(loaded.model, examples)
        torch.autograd.grad(output.sum(), tensors, allow_unused=True)


def filled(examples: Sequence[Example], token_budget: int) -> list[Example]:
    """Examples, over and over, that fill one batch of the budget with pads counted."""
    longest = max(example.size for example in examples)
    return [examples[place % len(examples)] for place in range(max(1, token_budget // longest))]
