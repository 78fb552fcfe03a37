"""Peak memory of a process."""

from __future__ import annotations

import re
from pathlib import Path


def high_water() -> int:
    """Peak resident bytes of this process: ru_maxrss would count the parent's, from before the program was started."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])
