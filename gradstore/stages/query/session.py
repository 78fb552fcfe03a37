"""A store opened for queries: its model, and the features that are read again and again, stay in memory between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Self, cast
from uuid import uuid4

from gradstore.adapters import QueryReader, TakesQueries
from gradstore.cluster import Engine, Task, refuse_device
from gradstore.errors import GradstoreError, NotReadyError, SpecError
from gradstore.plan.resolve import make_adapter
from gradstore.plan.self_influence import needs_self_influence
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.contribute.rows import prepare_rows, score_transform
from gradstore.stages.known_kernels import choose_kernel, query_spec, weights_for
from gradstore.stages.progress import Progress
from gradstore.stages.query.answer import Answer, Group, rankings_of
from gradstore.stages.query.asked import Place, copy_row, featurize_examples, precondition, refuse_other_model
from gradstore.stages.query.screened import Screening, rank_candidates
from gradstore.stages.ranking import QUERY_BYTES, Ranker, Winners, query_bytes, rank
from gradstore.stages.sketches import Sketch
from gradstore.stages.spectra import KeptSpectra
from gradstore.stages.weights import UNWEIGHTED, read_weights
from gradstore.store.artifacts import SelfInfluenceArtifact
from gradstore.store.backend import open_storage
from gradstore.store.backend.overlay import OverlayStorage, overlay_url
from gradstore.store.examples import Example
from gradstore.store.features import FeatureSet, FeatureStore, KeepingReader, KeptBlocks, Room


class Session:
    """Answers queries from a store, which is only read: what a query needs is made in memory.

    What is loaded and read for one query stays for the next: the model, and spectra and features of the first blocks as far as
    memory goes. Where the train set is appended to or erased from meanwhile, the kernel is stale, which ends queries with an error.

    Parameters
    ----------
    url
        The store: a directory or s3://bucket/prefix.
    kernel
        Name of the kernel; it may be left out where the store has one.
    weights
        Names of the weights to rank by, beside equal ones; by default all that were learned under the kernel.
    memory_bytes
        Most memory for spectra and features that are kept between queries.
    model
        Where the model is, if not where it was when the store was made.
    device
        Where it computes: auto, cpu or cuda.

    Attributes
    ----------
    progress
        Told of every reading of features; quiet unless another is put in its place.

    Raises
    ------
    NotReadyError
        If there is no store, or weights, or what the kernel needs of every row, are missing.
    SpecError
        If the kernel has to be chosen, or there is none of that name.
    """

    def __init__(
        self,
        url: str,
        *,
        kernel: str | None = None,
        weights: Sequence[str] | None = None,
        memory_bytes: int = 4 * 2**30,
        model: str | None = None,
        device: str = "auto",
    ) -> None:
        refuse_device("--device", device)
        below = open_storage(url)
        # Relative paths are whole now, so that the folder may change.
        self._below, self._url = below.url, overlay_url(uuid4().hex, below.url)
        self._keep(memory_bytes)
        self.progress = Progress(quiet=True)
        self._sketch: Sketch | None = None
        with self._told():
            self._store = FeatureStore.open(self._url)
            chosen = choose_kernel(self._store, kernel)
            self._spec = query_spec(self._store, chosen, model=model, device=device)
            names = weights_for(self._store, chosen[0], None if weights is None else [*weights])
            self._weightings = {name or UNWEIGHTED: read_weights(self._store, name) for name in (None, *names)}
            self._refuse_missing_rows()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory that features, queries and a sketch take."""
        self._keep(0)
        self._sketch = None
        self._overlay.drop("")

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return self._spec.kernel.name

    def query(
        self,
        text: str | None = None,
        *,
        record: Mapping[str, Any] | None = None,
        index: str | None = None,
        k: int = 10,
        truncate: bool = False,
        exact: bool = False,
    ) -> Answer:
        """Answer one query: a text, a record of another form, or a row that is stored.

        Parameters
        ----------
        text
            A text.
        record
            ``{"prompt": ..., "completion": ...}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``.
        index
            A stored row, such as ``eval:12``; for it no model is loaded.
        k
            How many examples of the highest, and of the lowest scores; a sketch is of use up to 100.
        truncate
            Whether a query that is longer than data.eval.length is cut to it.
        exact
            Whether every row is scored, though the store has a sketch of the kernel.

        Raises
        ------
        SpecError
            If not one of the three is given, k is 0 or more than the train examples, or there is no such row.
        DataError
            If the query cannot be one: empty, too long, or not finite under the model.
        ContractError
            If the model is not the one that the store was made with, or the kernel is stale.
        """
        given = [value for value in (text, record, index) if value is not None]
        if len(given) != 1:
            raise SpecError(f"query: found {len(given)} of text, record and index; accepted: one of them.")
        if index is not None:
            self._refuse_k(k)
            with self._told(), self._forgetting():
                name, example = copy_row(self._store, Place.parse(index))
                return self._answers(name, [example], [index], k, self._find_sketch(exact=exact))[0]
        return self.query_all([record if text is None else {"text": text}], k=k, truncate=truncate, exact=exact)[0]  # type: ignore[list-item]

    def query_all(
        self, records: Sequence[Mapping[str, Any]], *, k: int = 10, truncate: bool = False, exact: bool = False
    ) -> list[Answer]:
        """Answer many queries in one reading of the features, or as few as their memory asks for; see `query`.

        A record is ``{"text": ...}`` or one of the other forms.
        """
        self._refuse_k(k)
        with self._told():
            examples = self._read(records, truncate=truncate)
            sketch = self._find_sketch(exact=exact)
            found: list[Answer] = []
            at_once = max(1, QUERY_BYTES // self._query_bytes(sketch))
            for first in range(0, len(examples), at_once):
                batch = examples[first : first + at_once]
                with self._forgetting():
                    name = featurize_examples(self._store, self._spec, batch)
                    found += self._answers(name, batch, [example.example_id for example in batch], k, sketch)
            return found

    def _keep(self, memory_bytes: int) -> None:
        """Begin to keep what is read, in so much memory."""
        room = Room(memory_bytes)
        self._blocks, self._spectra = KeptBlocks(room), KeptSpectra(room)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Forget in the end what was made in memory, also of queries that were refused."""
        try:
            yield
        finally:
            self._overlay.drop("")

    def _answers(
        self, name: str, examples: Sequence[Example], called: Sequence[str], k: int, sketch: Sketch | None
    ) -> list[Answer]:
        """Answers to the queries of a set that was made in memory."""
        from threadpoolctl import threadpool_limits

        kernel = self._spec.kernel.name
        # Products of so few queries wait for memory, and more threads of theirs for those that read.
        with threadpool_limits(1):
            precondition(self._store, self._spec, name, self._spectra)
            slab = Slab(target=Target(kernel=kernel, set_name=name), first=0, last=len(examples))
            found, screening = self._rank(slab, k, sketch)
        train = self._train
        groups = tuple(
            Group(name=array.name, depth=array.depth, function=array.function) for array in train.info.arrays
        )
        return [
            Answer(
                query=query,
                label=example.label,
                text=example.text,
                kernel=kernel,
                rankings=rankings,
                groups=groups,
                screening=screening,
            )
            for query, example, rankings in zip(called, examples, rankings_of(train, found), strict=True)
        ]

    def _find_sketch(self, *, exact: bool) -> Sketch | None:
        """The store's sketch, of which what is read stays in memory while it is the same."""
        found = None if exact else Sketch.find(self._store, self._spec)
        if found is None:
            return None
        if self._sketch is None or not self._sketch.is_same(found):
            self._sketch = found
        return self._sketch

    def _rank(self, slab: Slab, k: int, sketch: Sketch | None) -> tuple[dict[str, Winners], Screening | None]:
        """Winners of some queries: through the sketch if the store has one, else by all rows."""
        if sketch is not None:
            screened = rank_candidates(self._ranker, sketch, slab, k)
            if screened is not None:
                return screened
            self.progress.note(
                f"{sketch.artifact.folder}: no number of candidates is sure enough and a quarter of the rows or fewer; every row is scored"
            )
        return rank(self._ranker, slab, k), None

    @cached_property
    def _read(self) -> QueryReader:
        """What makes examples of queries, of the model that the store was made with."""
        adapter = make_adapter(self._spec)
        if not isinstance(adapter, TakesQueries):
            raise SpecError(
                f"query: {self._below} is of the adapter {self._spec.model.adapter}, which makes no example of a new query. Ask by "
                "a stored row: --index eval:12."
            )
        refuse_other_model(self._store, adapter)
        return adapter.query_reader()

    @property
    def _train(self) -> FeatureSet:
        """The train set as it is now."""
        return self._store.open_set("train")

    @property
    def _overlay(self) -> OverlayStorage:
        assert isinstance(self._store.storage, OverlayStorage), "queries are written over the store"
        return self._store.storage

    @property
    def _ranker(self) -> Ranker:
        return Ranker(
            store=self._store,
            spec=self._spec,
            weightings=self._weightings,
            transform=score_transform(str(self._store.contract["model"].get("output"))),
            make_reader=partial(KeepingReader, self._blocks),
            progress=self.progress,
        )

    def _query_bytes(self, sketch: Sketch | None) -> int:
        """Memory that one more query of a reading takes."""
        # Estimates under every weighting, their order, and which are finite.
        estimates = 0 if sketch is None else 12 * len(self._weightings) * self._train.info.rows
        return estimates + query_bytes(self._train.info)

    def _refuse_k(self, k: int) -> None:
        most = self._train.info.num_examples
        if not 1 <= k <= most:
            raise SpecError(f"--k: found {k}; accepted: 1 to {most:,}, the train examples.")

    def _refuse_missing_rows(self) -> None:
        """Make sure that what every row counts by is there: making it would take a run of its own."""
        output = self._store.contract["model"].get("output")
        if needs_self_influence(self._spec, output):
            for member in self._train.info.members:
                artifact = SelfInfluenceArtifact.open(self._store.storage, self._spec.kernel.name, member)
                if not artifact.is_complete():
                    raise NotReadyError(
                        f"{self._below}/{artifact.folder}: is not whole. Run `gradstore self-influence` again."
                    )
        prepare_rows(self._spec, cast(Engine, _NoEngine()), self.progress)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Have errors name the store that the user knows."""
        try:
            yield
        except GradstoreError as error:
            raise type(error)(str(error).replace(self._url, self._below)) from error


class _NoEngine:
    """Stands for an engine where everything is there already."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        assert not tasks, "what is missing was refused"
        return iter(())
