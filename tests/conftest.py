"""Settings that every test runs under."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Bit-identical numbers and honest CPU seconds want one thread; two cores are shared with worker processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.servers"]

settings.register_profile("gradstore", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("gradstore")


def pytest_configure(config: pytest.Config) -> None:
    """Give a command less time than its test, so that it is the command that tells where it hangs; and let it hear Ctrl-C."""
    from tests.runs import PATIENCE

    # A shell has what it runs in the background ignore Ctrl-C, and whatever that starts, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    limit = float(config.getoption("timeout") or config.getini("timeout"))
    os.environ[PATIENCE] = str(0.85 * limit)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a corpus and a run.toml whose store does not exist."""
    from tests.runs import make_run

    folder = tmp_path_factory.mktemp("tiny")
    make_run(folder, str(folder / "store"))
    return folder
