"""Settings that every test runs under."""

from __future__ import annotations

import os

from hypothesis import settings

# Bit-identical numbers and honest CPU seconds want one thread; two cores are shared with worker processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.servers"]

settings.register_profile("gradstore", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("gradstore")
