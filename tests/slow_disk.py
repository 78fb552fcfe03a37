"""A module that workers load first: their disk takes its time for everything that is to be durable."""

from __future__ import annotations

import os
import time
from typing import Any

SECONDS = 0.04
_sync = os.fsync


def _sync_slowly(fd: Any) -> None:
    time.sleep(SECONDS)
    _sync(fd)


os.fsync = _sync_slowly
