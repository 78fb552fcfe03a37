"""A writer process: opens a store's train set and writes blocks of it, in an order of its own.

    python -m tests.faults.writer URL --seed 3 [--blocks 0,2] [--stop-before CHANGES]

Every line that it prints is a JSON object: a block with the attempt whose record counts, or the error that ended it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys

from gradstore.errors import GradstoreError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.features import FeatureStore
from tests import stores
from tests.storages import KillingStorage


def main() -> int:
    """Write, and return the exit status: 0, or that of the error."""
    arguments = _parser().parse_args()
    storage: Storage = open_storage(arguments.url)
    if arguments.stop_before is not None:
        # A process that stops itself is stopped exactly there; the test lets it go on with SIGCONT.
        storage = KillingStorage(
            storage, changes=arguments.stop_before, event=lambda: os.kill(os.getpid(), signal.SIGSTOP)
        )
    try:
        _write(storage, arguments.seed, arguments.blocks)
    except GradstoreError as error:
        _say(error=type(error).__name__, message=str(error))
        return error.exit_code
    return 0


def _write(storage: Storage, seed: int, blocks: list[int] | None) -> None:
    feature_set = FeatureStore.open(storage).open_set("train")
    todo = feature_set.missing_blocks() if blocks is None else blocks
    random.Random(seed).shuffle(todo)
    for block in todo:
        _say(block=block, attempt=stores.write(feature_set, block).attempt)


def _say(**facts: str | int) -> None:
    print(json.dumps(facts), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which blocks are written")
    parser.add_argument("--blocks", type=lambda text: [int(number) for number in text.split(",")])
    parser.add_argument("--stop-before", type=int, help="stop before the object after this many")
    return parser


if __name__ == "__main__":
    sys.exit(main())
