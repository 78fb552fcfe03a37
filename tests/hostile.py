"""Hostile and malformed inputs, made by systematic mutation of a small run and its store."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.codecs import encode_document
from tests import synthetic
from tests.runs import InThisProcess

DEEP = 20_000
MANY_DIGITS = "9" * 5_000
TRAVERSAL = "../../../../etc/passwd"
STORE, SET = "gradstore.json", "features/train/set.0.json"
RECORD = "features/train/blocks/m0/000000.0.json"
KERNEL, PRODUCTS = "kernels/block/m0/artifact.json", "contributions/block/eval/artifact.json"
EXAMPLES, INPUTS = "features/train/examples/m0/000000.parquet", "features/train/inputs/000000.0.parquet"
ARRAY = "features/train/m0/layers.0.q_proj/zarr.json"
DOCUMENTS = {STORE: "status", SET: "status", RECORD: "export", KERNEL: "status", PRODUCTS: "status"}
TABLES = (EXAMPLES, INPUTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """One input: the file below the run's folder that is replaced, its new bytes, and a command that meets it."""

    name: str
    path: str
    content: bytes
    command: str

    def __str__(self) -> str:
        return self.name


def make(folder: Path) -> None:
    """Write a run and a store with features, a kernel and contributions."""
    spec = synthetic.make(
        folder,
        rows=24,
        queries=3,
        learn_queries=3,
        groups=2,
        features=4,
        kernel="block",
        block_rows=16,
        topics=2,
        contributors=1,
    )
    for stage in (featurize, build_kernel, contribute):
        stage(spec, InThisProcess(), Progress(quiet=True))  # type: ignore[arg-type]


def arguments(folder: Path, command: str) -> Sequence[str]:
    """Command line by which a command meets an input; `export` reads every row of the train set."""
    store = str(folder / "store")
    return {
        "plan": ["plan", str(folder / "run.toml")],
        "status": ["status", store],
        "verify": ["verify", store, "--full", "--quiet"],
        "export": ["export", store, str(folder / "out.parquet"), "--force", "--quiet"],
    }[command]


def inputs(folder: Path) -> Iterator[Hostile]:
    """Every hostile input for a run that `make` wrote."""
    yield from _runs((folder / "run.toml").read_text())
    for path, command in DOCUMENTS.items():
        for name, content in _broken((folder / "store" / path).read_bytes()):
            yield Hostile(name=f"{path}: {name}", path=f"store/{path}", content=content, command=command)
    for path in (*TABLES, ARRAY):
        for name, content in _broken((folder / "store" / path).read_bytes()):
            yield Hostile(name=f"{path}: {name}", path=f"store/{path}", content=content, command="verify")
    yield from _forged(folder)


def _broken(content: bytes) -> Iterator[tuple[str, bytes]]:
    """What may be in place of any document."""
    middle = len(content) // 2
    yield "empty", b""
    yield "cut in the middle", content[:middle]
    yield "cut at its end", content[:-1] if content[-1:] != b"\n" else content[:-2]
    yield "one bit", content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    yield "twice", content + content
    yield "not UTF-8", content[:middle] + b"\xff\xfe" + content[middle:]
    yield "deep", b"[" * DEEP + b"]" * DEEP
    yield "deep tables", b'{"a":' * DEEP + b"1" + b"}" * DEEP
    yield "not an object", b"[1, 2, 3]"
    yield "null", b"null"
    yield "a number of many digits", b'{"crc32c": ' + MANY_DIGITS.encode() + b"}"
    yield "not a number", b'{"rows": NaN, "crc32c": "00000000"}'
    yield "a key twice", b'{"crc32c": "00000000", "crc32c": "11111111"}'


def _runs(text: str) -> Iterator[Hostile]:
    def run(name: str, content: str | bytes) -> Hostile:
        data = content.encode() if isinstance(content, str) else content
        return Hostile(name=f"run.toml: {name}", path="run.toml", content=data, command="plan")

    # A cut, or one bit, may leave a run that holds together.
    for name, content in _broken(text.encode()):
        if name not in ("one bit", "cut in the middle", "cut at its end"):
            yield run(name, content)
    yield run("cut before its data", text[: text.index("[data")])
    yield run("cut in a key", text[: text.index("store = ") + len("store =")])
    yield run("UTF-16", text.encode("utf-16"))
    yield run("a NUL", text.replace('name = "', 'name = "\\u0000', 1))
    yield run("a table twice", text + "\n[run]\n")
    yield run("dotted keys without end", f"{'.'.join(['a'] * DEEP)} = 1\n{text}")
    yield run("an unknown table", text + "\n[secrets]\nkey = 1\n")
    yield run("a date for a name", text.replace("[run]", "[run]\nseed = 1979-05-27", 1))
    cases: Sequence[tuple[str, str, Sequence[Any]]] = (
        ("run", "name", (TRAVERSAL, "", "a\nb", 7, [], {})),
        ("run", "store", ("", 7, [])),
        ("run", "seed", (-1, 2**63, 1.5, "x", True)),
        ("learn", "k", (0, -3, 10**30, 1.5, "many")),
        ("learn", "learning_rate", (0.0, -1.0, float("nan"), float("inf"), "fast")),
        ("learn", "memory", ("lots", "-1GiB", "1e9", 5)),
        ("learn", "name", (TRAVERSAL, "a.b", "unweighted")),
        ("kernel", "name", (TRAVERSAL, "a/b", "baseline")),
        ("kernel", "kind", ("none", TRAVERSAL)),
        ("kernel", "damping", (-1.0, "x", [], [0.1, 0.1], float("nan"))),
        ("features", "dtype", ("float8", 16)),
        ("features", "block_rows", (0, -16, 10**30)),
        ("features", "max_invalid", (2.0, float("nan"))),
        ("cluster", "workers", (0, -1, 10**40, "all")),
        ("cluster", "kind", ("cloud",)),
        ("cluster", "memory_per_worker", ("", "1 TB/s", "0x10GiB")),
        ("contribute", "dtype", ("float64",)),
        ("contribute", "weights", (TRAVERSAL,)),
        ("score", "k", (0, -1)),
    )
    for table, key, values in cases:
        for value in values:
            yield run(f"{table}.{key} = {value!r:.20}", _with(text, table, key, value))


def _with(text: str, table: str, key: str, value: Any) -> str:
    """A run.toml in which one key has another value."""
    import tomllib

    tables = tomllib.loads(text)
    tables.setdefault(table, {})[key] = value
    return "\n".join(_toml(tables))


def _toml(tables: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tables.items():
        if not isinstance(value, dict):
            yield f"{key} = {_spelt(value)}"
    for key, value in tables.items():
        if isinstance(value, dict):
            yield f"[{prefix}{key}]"
            yield from _toml(value, f"{prefix}{key}.")


def _spelt(value: Any) -> str:
    return repr(value) if isinstance(value, float) else json.dumps(value)


def _forged(folder: Path) -> Iterator[Hostile]:
    """Documents whose checksum is right, as somebody would write who means harm."""
    huge, first = 2**70, ("info", "arrays", 0)
    cases: Sequence[tuple[str, str, Sequence[str | int], Sequence[Any]]] = (
        (SET, "status", ("info", "rows"), (None, -1, huge, 2**50, "24", 1.5, True)),
        (SET, "status", ("info", "block_rows"), (0, -1, "x", None)),
        (SET, "status", ("info", "name"), (TRAVERSAL, "", None, "eval")),
        (SET, "status", ("info", "members"), ([], [TRAVERSAL], None, [[]], "m0")),
        (SET, "status", ("info", "dtype"), ("float8", None, {})),
        (SET, "status", ("info", "arrays"), (None, {}, [1], "x")),
        (SET, "status", ("info", "gaps"), (-1, [[1]], [["a", "b"]])),
        (SET, "status", ("info", "erased"), (-1, ["x"], [None])),
        (SET, "status", (*first, "features"), (0, -1, huge, "4", 1.5)),
        (SET, "status", (*first, "scale"), (None, 3.0, "x")),
        (SET, "status", (*first, "name"), (None, -1, {})),
        (SET, "status", (*first, "parts"), (-1, [1])),
        (SET, "status", ("inputs",), ({}, [], None)),
        (RECORD, "export", ("objects",), ({}, [], None)),
        (RECORD, "export", ("unit",), (7, None, "x")),
        (RECORD, "export", ("generation",), (2, None)),
        (KERNEL, "status", ("num_units",), (None, -1, huge, 2**40, "x", 1.5)),
        (KERNEL, "status", ("kind",), (None, TRAVERSAL, [])),
        (KERNEL, "status", ("settings",), (None, [], "x")),
        (KERNEL, "status", ("settings", "train", 0, "blocks"), (1.5, "xy", [[0]], [["a", "b"]])),
        (KERNEL, "verify", ("settings", "widths"), (None, [], {})),
        (PRODUCTS, "status", ("settings", "shape"), (None, [], {})),
        (PRODUCTS, "verify", ("recorded", "shape", "block_rows"), (-1, None, "x")),
    )
    for path, command, key, values in cases:
        document = json.loads((folder / "store" / path).read_bytes())
        del document["crc32c"]
        for value in values:
            content = b"".join(bytes(part) for part in encode_document(_put(document, key, value)).parts)
            name = f"{path}: forged {'.'.join(map(str, key))} = {value!r:.20}"
            yield Hostile(name=name, path=f"store/{path}", content=content, command=command)


def _put(document: dict[str, Any], key: Sequence[str | int], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    node: Any = changed
    for part in key[:-1]:
        node = node[part]
    node[key[-1]] = value
    return changed
