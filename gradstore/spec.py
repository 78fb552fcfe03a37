"""RunSpec: what run.toml says, as frozen values, and the errors for what it may not say.

Paths: ``run.store`` is relative to the working directory, as on the command line; every other relative path is relative
to the folder of run.toml, so that a pipeline's folder can be copied as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from gradstore.errors import SpecError

# Part of the machine's memory that the workers of an embedded cluster share; the rest is this process and the page cache.
MEMORY_SHARE = 0.8
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

SPLITS = ("train", "learn", "eval")
T = TypeVar("T")


class Section(BaseModel):
    """A table of run.toml: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(Section):
    """[run]: what the run is called, where its store is, and the seed that every random draw is derived from."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    store: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class ModelSection(Section):
    """[model]: which model, and in what precision it is run."""

    adapter: str = "causal_lm"
    source: str = Field(min_length=1)
    gguf_file: str | None = None
    revision: str | None = None
    config: str | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


class SplitSection(Section):
    """[data.train], [data.learn], [data.eval]: one split of the data. [data] itself may hold shared defaults."""

    source: str = Field(min_length=1)
    format: Literal["auto", "text", "jsonl", "parquet", "datasets"] = "auto"
    subset: str | None = None
    split: str | None = None
    encoding: str | Annotated[list[str], Field(min_length=1)] = "utf-8"
    text: str = "text"
    label: str | None = None
    id: str | None = None
    packing: Literal["document", "concatenate"] = "document"
    length: int = Field(default=512, ge=2)
    start: int | None = Field(default=None, ge=0)
    rows: int | None = Field(default=None, ge=1)

    @property
    def origin(self) -> tuple[str | None, ...]:
        """What tells the sources of two splits apart."""
        return (self.source, self.subset, self.split)


class DataSection(Section):
    """[data]: the three splits, and what is done to the documents before they are split."""

    deduplicate: bool = True
    shuffle: bool = True
    train: SplitSection
    learn: SplitSection
    eval: SplitSection

    @model_validator(mode="before")
    @classmethod
    def _share_defaults(cls, values: Any) -> Any:
        """Keys of a split that stand in [data] itself are the defaults of all three."""
        if not isinstance(values, Mapping):
            return values
        shared = {key: value for key, value in values.items() if key in SplitSection.model_fields}
        rest = {key: value for key, value in values.items() if key not in shared}
        for split in SPLITS:
            own = rest.get(split, {})
            rest[split] = {**shared, **own} if isinstance(own, Mapping) else own
        return rest

    def splits(self) -> dict[str, SplitSection]:
        """The splits by name, in the order in which they take their rows."""
        return {name: getattr(self, name) for name in SPLITS}

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Rows [start, stop) that each split takes of its source; stop is None for all that is left.

        A split without ``start`` begins where the one before it, of the same source, ended.

        Raises
        ------
        SpecError
            If two splits of one source overlap.
        """
        taken: dict[tuple[str | None, ...], list[tuple[str, int, int | None]]] = {}
        ranges: dict[str, tuple[int, int | None]] = {}
        for name, split in self.splits().items():
            earlier = taken.setdefault(split.origin, [])
            start = split.start
            if start is None:
                start = _after(name, earlier)
            stop = None if split.rows is None else start + split.rows
            for other, first, last in earlier:
                if (last is None or start < last) and (stop is None or first < stop):
                    raise SpecError(
                        f"data.{name}: rows {_range(start, stop)} of {split.source} overlap rows {_range(first, last)} "
                        f"of data.{other}. The three splits have disjoint roles: change start or rows."
                    )
            earlier.append((name, start, stop))
            ranges[name] = (start, stop)
        return ranges


class GroupsSection(Section):
    """[features.groups]: how parameters are partitioned into groups."""

    rule: str = "module"
    include: str = ".*"
    exclude: str = ""
    output_head: bool = False


class FeaturesSection(Section):
    """[features]: groups, projection (a kind and its options) and how features are computed and stored."""

    groups: GroupsSection = GroupsSection()
    projection: dict[str, Any] = Field(default_factory=lambda: {"kind": "logra", "rank": 16})
    dtype: Literal["float32", "float16"] = "float16"
    block_rows: int | None = Field(default=None, ge=1)
    token_budget: int = Field(default=4096, ge=1)


class KernelSection(Section):
    """[kernel]: a kind and its options; ``name`` tells apart several kernels of one store."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    kind: str = "block"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, values: Any) -> Any:
        """Keys other than name and kind are the kind's options, checked when the kind is resolved."""
        if not isinstance(values, Mapping):
            return values
        own = {key: value for key, value in values.items() if key in ("name", "kind")}
        rest = {key: value for key, value in values.items() if key not in ("name", "kind")}
        if set(rest) == {"options"} and isinstance(rest["options"], Mapping):
            rest = dict(rest["options"])
        own.setdefault("name", own.get("kind", "block"))
        return {**own, "options": rest}


class ContributeSection(Section):
    """[contribute]: how C[q, n, j] is stored."""

    dtype: Literal["float32", "float16"] = "float32"


class LearnSection(Section):
    """[learn]: Algorithm 1's settings."""

    name: str = Field(default="learned", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    k: int = Field(default=10, ge=1)
    epochs: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    seed: int | None = Field(default=None, ge=0)


class TailPatchSection(Section):
    """[score.tail_patch]: one optimizer step on a query's proponents, and what it does to the query."""

    queries: int = Field(default=10, ge=0)
    k: int = Field(default=10, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0)


class ScoreSection(Section):
    """[score]: how many proponents and opponents are kept per query, and what they are compared with."""

    k: int = Field(default=10, ge=1)
    tail_patch: TailPatchSection = TailPatchSection()


class ClusterSection(Section):
    """[cluster]: where tasks run."""

    kind: Literal["local", "scheduler"] = "local"
    address: str | None = None
    workers: int | None = Field(default=None, ge=1)
    memory_per_worker: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def num_workers(self) -> int:
        """Workers of the run: as declared, else one per core of this machine."""
        return self.workers or os.cpu_count() or 1

    @property
    def worker_memory_bytes(self) -> int:
        """Memory that one worker may use: as declared, else its share of this machine's memory."""
        if self.memory_per_worker == "auto":
            return int(psutil.virtual_memory().total * MEMORY_SHARE) // self.num_workers
        return _bytes(self.memory_per_worker)

    @model_validator(mode="after")
    def _check(self) -> ClusterSection:
        if self.memory_per_worker != "auto":
            _bytes(self.memory_per_worker)
        if self.kind == "scheduler" and self.address is None:
            raise SpecError('cluster.address: is missing; kind = "scheduler" needs one, such as "tls://host:8786".')
        return self


class RunSpec(Section):
    """All of run.toml."""

    run: RunSection
    model: ModelSection
    data: DataSection
    features: FeaturesSection = FeaturesSection()
    kernel: KernelSection = Field(default_factory=lambda: KernelSection(name="block"))
    contribute: ContributeSection = ContributeSection()
    learn: LearnSection = LearnSection()
    score: ScoreSection = ScoreSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _check(self) -> RunSpec:
        self.data.ranges()
        return self


def read_spec(path: str | Path) -> RunSpec:
    """Read and check run.toml; relative paths inside it are made absolute against its folder.

    Raises
    ------
    SpecError
        With one line per problem: the key, what was found, and what is accepted.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{path}: no such file. `gradstore init` writes one.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not readable as TOML: {error}.") from error
    return parse_spec(values, origin=str(path), folder=path.resolve().parent)


def parse_spec(values: Mapping[str, Any], *, origin: str = "run.toml", folder: Path | None = None) -> RunSpec:
    """Check the values of a run.toml; see `read_spec`."""
    try:
        spec = RunSpec.model_validate(dict(values))
    except ValidationError as error:
        raise SpecError(f"{origin}: " + "\n".join(_explain(problem, RunSpec) for problem in error.errors())) from error
    except SpecError as error:
        raise SpecError(f"{origin}: {error}") from error
    return spec if folder is None else _resolve_paths(spec, folder)


def resolve_kind(kinds: Mapping[str, type[T]], kind: str, options: Mapping[str, Any], key: str) -> T:
    """Make the dataclass that ``kinds`` holds under ``kind`` from its options, with their names and types checked.

    Raises
    ------
    SpecError
        If the kind is unknown, or an option is unknown, missing or of the wrong type.
    """
    if kind not in kinds:
        raise SpecError(f"{key}.kind: found {kind!r}; accepted: {', '.join(sorted(kinds))}.")
    cls = kinds[kind]
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            accepted = f"accepted for {kind}: {', '.join(fields)}" if fields else f"{kind} takes no options"
            raise SpecError(f"{key}.{option}: unknown key; {accepted}.")
    definitions: dict[str, Any] = {
        name: (hints[name], ... if field.default is dataclasses.MISSING else field.default)
        for name, field in fields.items()
    }
    checker = create_model(cls.__name__, __config__=ConfigDict(strict=True), **definitions)
    try:
        checked = checker.model_validate(dict(options))
    except ValidationError as error:
        raise SpecError("\n".join(_explain(problem, None, key) for problem in error.errors())) from error
    return cls(**{name: getattr(checked, name) for name in fields})


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of every leaf in which two nested mappings differ; None stands for an absent key."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*ours, *theirs}):
        left, right, name = ours.get(key), theirs.get(key), f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{name}.")
        elif left != right:
            found.append((name, left, right))
    return found


def content_hash(value: Any) -> str:
    """Hex digest of a JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _resolve_paths(spec: RunSpec, folder: Path) -> RunSpec:
    def absolute(value: str) -> str:
        # A hub id and a package: or s3:// source are no paths; only what exists beside run.toml is one.
        candidate = folder / value
        return str(candidate) if ":" not in value and candidate.exists() else value

    model = {"source": absolute(spec.model.source)}
    if spec.model.config is not None:
        model["config"] = str(folder / spec.model.config)
    splits = {
        name: split.model_copy(update={"source": absolute(split.source)}) for name, split in spec.data.splits().items()
    }
    return spec.model_copy(
        update={"model": spec.model.model_copy(update=model), "data": spec.data.model_copy(update=splits)}
    )


def _explain(problem: Any, model: type[BaseModel] | None, prefix: str = "") -> str:
    """One line for one pydantic problem: the key, what was found, what is accepted."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join([prefix, *path] if prefix else path)
    if problem["type"] == "extra_forbidden":
        accepted = ", ".join(_keys_beside(model, path)) if model else ""
        return f"{key}: unknown key; accepted here: {accepted}."
    if problem["type"] == "missing":
        return f"{key}: is missing."
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key}: found {problem['input']!r}; accepted: {message}."


def _keys_beside(model: type[BaseModel], path: list[str]) -> list[str]:
    current: type[BaseModel] = model
    for part in path[:-1]:
        field = current.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        current = annotation
    keys = list(current.model_fields)
    if current is DataSection:
        keys += [f"{key} (default of all splits)" for key in SplitSection.model_fields]
    return keys


def _bytes(text: str) -> int:
    """Number of bytes that a size such as 4GiB or 500MB stands for."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise SpecError(
            f'cluster.memory_per_worker: found {text!r}; accepted: "auto" or a size such as "4GiB" or "500MB".'
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _after(name: str, earlier: list[tuple[str, int, int | None]]) -> int:
    if not earlier:
        return 0
    other, _, stop = earlier[-1]
    if stop is None:
        raise SpecError(
            f"data.{name}: data.{other} declares no rows, so it takes all of the source that both name. "
            f"Set data.{other}.rows, or give data.{name} another source."
        )
    return stop


def _range(start: int, stop: int | None) -> str:
    return f"[{start}, {'end' if stop is None else stop})"
