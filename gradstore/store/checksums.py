"""Checksums of rows: one of every example's features, for readers of single rows, of which a chunk's says nothing."""

from __future__ import annotations

from collections.abc import Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt


def extend_checksums(checksums: npt.NDArray[np.uint32], groups: Sequence[npt.NDArray[np.float32]]) -> None:
    """Go on with the crc32c of every row, in place, by its features in some groups, float32 [rows, k_j], one after another."""
    for place, row in enumerate(checksums.tolist()):
        crc = row
        for rows in groups:
            crc = google_crc32c.extend(crc, rows[place])
        checksums[place] = crc
