"""Random draws that never change: the same bits for a key on every machine, device, library version and call order.

The stream of a key is Philox4x64-10, a counter-based generator: words 4c to 4c + 3 (uint64) are its output at counter
c + 1. Matrices give each row its own whole number of counters, so that any row can be drawn without those before it.
numpy's distributions are not used: only the raw words of its bit generators are promised to stay as they are.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float64, Int8, Int64, UInt64

WORDS_PER_COUNTER = 4
BITS_PER_COUNTER = 64 * WORDS_PER_COUNTER


def derive_key(seed: int, group: str, side: str) -> int:
    """128-bit key of one use of randomness: the blake2b hash of (seed, group, side).

    Parameters
    ----------
    seed
        The run's seed, 0 <= seed < 2**64.
    group
        The name of the parameter group, or of whatever else is drawn for.
    side
        Which of that group's draws: ``input``, ``output``, ...
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=16, person=b"gradstore")
    for part in (group, side):
        encoded = part.encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def words(key: int, count: int) -> UInt64[np.ndarray, " count"]:
    """The first ``count`` words of a key's stream."""
    return np.random.Philox(key=key).random_raw(count)


def successive(key: int, count: int) -> Iterator[UInt64[np.ndarray, " count"]]:
    """Yield the words of a key's stream, ``count`` at a time, without end."""
    stream = np.random.Philox(key=key)
    while True:
        yield stream.random_raw(count)


def stretches(key: int, counters: Iterable[tuple[int, int]]) -> Iterator[UInt64[np.ndarray, " words"]]:
    """The words of some stretches of a key's stream: of each from its first counter up to its last, without those before."""
    # One for all: making one costs as much as thousands of words.
    stream = np.random.Philox(key=key)
    state = stream.state
    for first, last in counters:
        state["state"]["counter"][0] = first
        stream.state = state
        yield stream.random_raw(WORDS_PER_COUNTER * (last - first))


def rademacher(key: int, rows: int, columns: int) -> Int8[np.ndarray, "rows columns"]:
    """Matrix of -1 and +1 with equal probability; its first r rows are the matrix of r rows.

    Entry (i, j) is bit j (least significant first) of row i's words: set is +1.
    """
    counters = -(-columns // BITS_PER_COUNTER)
    raw = words(key, rows * counters * WORDS_PER_COUNTER).astype("<u8", copy=False)
    packed = raw.view(np.uint8).reshape(rows, counters * BITS_PER_COUNTER // 8)
    bits = np.unpackbits(packed, axis=1, count=columns, bitorder="little")
    return bits.astype(np.int8) * np.int8(2) - np.int8(1)


def normal(key: int, rows: int, columns: int) -> Float64[np.ndarray, "rows columns"]:
    """Matrix of standard normal entries (Box-Muller); its first r rows are the matrix of r rows.

    Words 2j and 2j + 1 of row i make entries 2j (the cosine) and 2j + 1 (the sine). The words are the same everywhere,
    the entries as far as logarithm, sine and cosine in float64 are, so they are always drawn on the CPU.
    """
    counters = -(-columns // WORDS_PER_COUNTER)
    raw = words(key, rows * counters * WORDS_PER_COUNTER).reshape(rows, -1)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # 1 - u lies in (0, 1], so that the logarithm is finite.
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0::2]))
    angle = 2 * np.pi * uniform[:, 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return pairs.reshape(rows, -1)[:, :columns]


def permutation(stream: UInt64[np.ndarray, " count"]) -> Int64[np.ndarray, " count"]:
    """The permutation that sorts a stretch of a stream; 64-bit words make ties (broken by place) negligible."""
    return np.argsort(stream, kind="stable")
