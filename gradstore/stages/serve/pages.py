"""Pages of a store as HTML: read anew for every reader, as runs may be at work on it."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Final

import jinja2

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.jobs import list_jobs, read_lines, show
from gradstore.stages.progress import Progress, duration
from gradstore.stages.report.data import Group, WeightVector, groups_of, tail_patch_table
from gradstore.stages.report.evaluations import evaluated_kernels, measured_tables
from gradstore.stages.report.formatting import sentence
from gradstore.stages.report.layers import draw_weights, lay_out
from gradstore.stages.report.page import view_query, view_table
from gradstore.stages.report.queries import read_queries
from gradstore.stages.report.stage import Summary, lds_pictures, rankings_of, summarize
from gradstore.stages.report.templates import make_environment
from gradstore.stages.serve.examples import Examples
from gradstore.stages.show_weights import show_weights
from gradstore.stages.status import status
from gradstore.stages.verify import verify
from gradstore.stages.weights import UNWEIGHTED
from gradstore.store.features import FeatureStore

PAGE_ROWS: Final = 50
_MOST_RANKINGS: Final = 3
_MOST_GROUPS: Final = 40
# What is told of a store is read again after so many seconds; of jobs, which are watched for a while, after more.
_FRESH_SECONDS: Final = 5.0
_JOBS_SECONDS: Final = 30.0
_EXAMPLES_SECONDS: Final = 60.0
_PARTS: Final = (
    "kernels",
    "self_influence",
    "contributions",
    "moments",
    "score_matrices",
    "sketches",
    "weights",
    "scores",
    "baselines",
    "embeddings",
    "retrained",
    "patched",
    "evaluations",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What was read, when, and of which version."""

    at: float
    version: Any
    found: Any


# Without slots: what is read for some pages is read once.
@dataclass(kw_only=True)
class Pages:
    """The pages of the store at a URL; with ``redact`` without texts and images.

    Raises
    ------
    NotReadyError
        From all of them, where the store lacks what is asked for.
    SpecError
        Where what is asked for cannot be.
    """

    url: str
    redact: bool = False
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _locks: dict[str, Lock] = field(default_factory=dict)

    @cached_property
    def store(self) -> FeatureStore:
        """The store."""
        return FeatureStore.open(self.url)

    @property
    def examples(self) -> Examples:
        """Its examples, as they were a short while ago."""
        info = self.store.open_set("eval").info
        found: Examples = self._keep(
            "examples",
            _EXAMPLES_SECONDS,
            lambda: Examples(store=self.store, redact=self.redact),
            # Rows are added and erased, and neither comes back.
            version=(info.rows, len(info.erased)),
        )
        return found

    def overview(self) -> str:
        """What the store holds, and how far each part is."""
        found, run = self._status(), self.store.run
        facts = {
            "store": found["store"],
            "model": run["model"]["source"],
            "adapter": self.store.contract["model"]["adapter"],
            "output": self.store.contract["model"].get("output"),
            "projection": self.store.contract["projection"]["kind"],
            "seed": run["run"]["seed"],
            "jobs": len(found["jobs"]),
        }
        parts = [(key.replace("_", " "), found[key]) for key in _PARTS if found[key]]
        return self._render("overview.html.jinja", "Overview", facts=facts, sets=found["feature_sets"], parts=parts)

    def health(self) -> str:
        """What `gradstore verify` finds, without reading every byte."""
        found = verify(self.url, full=False, progress=Progress(quiet=True))
        return self._render("health.html.jinja", "Health", found=found)

    def queries(self, kernel: str | None, wanted: str, first: int) -> str:
        """The queries that a text is in, a page of them, and how good the rankings of a kernel are."""
        found = self._status()
        kernel = kernel or self._kernels()[0]
        rankings = rankings_of(found, kernel)
        try:
            summary = summarize(self.store, found, rankings)
        except NotReadyError as error:
            # Of scores without parts nothing was compared; the queries are there.
            summary = Summary(precision=(), tail_patch=(), comparisons=(), notes=(str(error),))
        listed = self.examples.find(wanted)
        if not 0 <= first <= len(listed):
            raise NotReadyError(f"there is no query {first:,} of {len(listed):,}.")
        return self._render(
            "queries.html.jinja",
            "Queries",
            kernel=kernel,
            kernels=self._kernels(),
            summary=summary,
            tail_patch=view_table(tail_patch_table(summary.tail_patch)),
            findings=[(comparison.verdict, sentence(comparison)) for comparison in summary.comparisons],
            wanted=wanted,
            first=first,
            total=len(listed),
            step=PAGE_ROWS,
            listed=listed[first : first + PAGE_ROWS],
            address=self.examples.address,
        )

    def query(self, kernel: str, row: int, names: Sequence[str]) -> str:
        """A query with its proponents and opponents by some rankings side by side."""
        rankings = rankings_of(self._status(), kernel)
        known = [ranking["weights"] or UNWEIGHTED for ranking in rankings]
        chosen = [name for name in known if name in names] if names else known[:2]
        if strange := sorted({*names} - {*known}):
            raise NotReadyError(f"{kernel}: has no ranking {strange[0]!r}; it has: {', '.join(known)}.")
        if len(chosen) > _MOST_RANKINGS:
            raise SpecError(f"found {len(chosen)} rankings; accepted: up to {_MOST_RANKINGS} side by side.")
        shown = [ranking for ranking in rankings if (ranking["weights"] or UNWEIGHTED) in chosen]
        rows = [query.row for query in self.examples.queries]
        if row not in rows:
            raise NotReadyError(f"features/eval: has no query in row {row:,}.")
        (found,) = read_queries(self.store, shown, [row], self.examples.address, redact=self.redact)
        layout, place = lay_out(self._groups()), rows.index(row)
        return self._render(
            "query.html.jinja",
            f"Query {row}",
            kernel=kernel,
            row=row,
            known=known,
            chosen=chosen,
            before=rows[place - 1] if place else None,
            after=rows[place + 1] if place + 1 < len(rows) else None,
            query=view_query(found, layout),
            layout=layout,
        )

    def weights(self, names: Sequence[str]) -> str:
        """Weights along depth; of two what tells them apart, group by group."""
        all_names = [row["name"] for row in self._status()["weights"] if row["committed"] == row["total"]]
        if not all_names:
            raise NotReadyError(f"{self.url}: holds no weights. Run `gradstore learn`.")
        if strange := sorted({*names} - {*all_names}):
            raise NotReadyError(f"{self.url}: has no weights {strange[0]!r}; it has: {', '.join(all_names)}.")
        chosen = [name for name in all_names if name in names] or all_names[:2]
        groups = self._groups()
        layout = lay_out(groups)
        found = show_weights(self.url, chosen, "group")
        vectors = [
            WeightVector(name=item["name"], weights=[row["weight"] for row in item["rows"]])
            for item in found["weights"]
        ]
        return self._render(
            "weights.html.jinja",
            "Weights",
            names=all_names,
            chosen=chosen,
            found=found,
            num_groups=len(groups),
            layout=layout,
            charts=[draw_weights(vector, layout) for vector in vectors],
            compared=_compared(vectors, layout.titles) if len(vectors) == 2 else [],
        )

    def evaluations(self, kernel: str | None) -> str:
        """What `gradstore evaluate` measured, and the pictures of LDS."""
        kernels = evaluated_kernels(self.store)
        kernel = kernel or next(iter(kernels), "")
        measured = self._keep(f"tables {kernel}", _EXAMPLES_SECONDS, lambda: measured_tables(self.store, kernel))
        tables = [view_table(table) for table in measured]
        return self._render(
            "evaluations.html.jinja",
            "Evaluations",
            kernel=kernel,
            kernels=kernels,
            tables=[table for table in tables if table is not None],
            pictures=self._keep("pictures", _EXAMPLES_SECONDS, self._pictures),
        )

    def jobs(self) -> str:
        """The runs that were submitted."""
        found = self._keep("jobs", _JOBS_SECONDS, lambda: list_jobs(self.url))
        return self._render("jobs.html.jinja", "Jobs", jobs=found["jobs"])

    def job(self, name: str) -> str:
        """One of them, with its lines."""
        found = self._keep(f"job {name}", _JOBS_SECONDS, lambda: show(self.url, name))
        return self._render("job.html.jinja", name, job=found, lines=read_lines(self.url, name)["lines"])

    def failure(self, title: str, text: str) -> str:
        """A page that says what cannot be shown."""
        return self._draw("failure.html.jinja", page=title, name="gradstore", text=text)

    def _pictures(self) -> list[tuple[str, str]]:
        return [(text, b64encode(png).decode()) for text, png in lds_pictures(self.store)]

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._keep("status", _FRESH_SECONDS, lambda: status(self.url))
        return found

    def _keep(self, key: str, seconds: float, read: Callable[[], Any], version: Any = None) -> Any:
        """What was read a short while ago, of the same version, or else anew; once for all who ask at the same time."""
        with self._locks.setdefault(key, Lock()):
            kept = self._kept.get(key)
            if kept is None or kept.version != version or time.monotonic() - kept.at > seconds:
                found = read()
                # As long ago as the reading ended.
                kept = self._kept[key] = _Kept(at=time.monotonic(), version=version, found=found)
            return kept.found

    def _kernels(self) -> list[str]:
        found = sorted({row["kernel"] for row in self._status()["scores"] if row["committed"] == row["total"]})
        if not found:
            raise NotReadyError(f"{self.url}: there are no finished scores. Run `gradstore score`.")
        return found

    def _groups(self) -> list[Group]:
        return groups_of(self.store.open_set("train").info.arrays)

    def _render(self, template: str, title: str, **values: Any) -> str:
        return self._draw(template, page=title, name=self._status()["name"], **values)

    def _draw(self, template: str, **values: Any) -> str:
        return self._environment.get_template(template).render(places=_PLACES, **values)

    @cached_property
    def _environment(self) -> jinja2.Environment:
        environment = make_environment("gradstore.stages.serve")
        environment.filters["duration"] = duration
        return environment


_PLACES: Final = (
    ("/", "Overview"),
    ("/queries", "Queries"),
    ("/weights", "Weights"),
    ("/evaluations", "Evaluations"),
    ("/jobs", "Jobs"),
    ("/health", "Health"),
)


def _compared(vectors: Sequence[WeightVector], titles: Sequence[str]) -> list[dict[str, Any]]:
    """The groups whose weights differ most between two vectors, in multiples of the uniform weight."""
    one, other = ([value * len(titles) for value in vector.weights] for vector in vectors)
    rows: list[dict[str, Any]] = [
        {"group": title, "one": first, "other": second, "difference": second - first}
        for title, first, second in zip(titles, one, other, strict=True)
    ]
    return sorted(rows, key=lambda row: -abs(row["difference"]))[:_MOST_GROUPS]
