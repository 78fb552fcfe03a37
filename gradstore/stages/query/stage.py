"""query: the train examples that a new query, or a stored row, ranks highest and lowest, and the layers that made it so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradstore.errors import DataError, SpecError
from gradstore.lines import read_objects
from gradstore.stages.query.answer import Answer, By, Ranking, Winner
from gradstore.stages.query.screened import Screening
from gradstore.stages.query.session import Session
from gradstore.stages.report.formatting import Scale, one_line, ranking_title
from gradstore.stages.sketches import Side

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_RECORDS: Final = (".jsonl", ".ndjson")
# Characters of texts, names and labels in a table.
_TEXT_LENGTH, _NAME_LENGTH, _LABEL_LENGTH = 200, 40, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a query is, in one of four ways: a text, a prompt with its completion, a file, or a stored row."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    file: Path | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        """Make sure that it is one of them.

        Raises
        ------
        SpecError
            Naming what was found.
        """
        found = [name for name in ("text", "prompt", "completion", "file", "index") if getattr(self, name) is not None]
        if found not in (["text"], ["prompt", "completion"], ["file"], ["index"]):
            raise SpecError(
                f"query: found {' and '.join(f'--{name}' for name in found) or 'nothing to ask'}; accepted: --text, or "
                "--prompt and --completion, or --file, or --index."
            )

    def records(self) -> list[Mapping[str, Any]]:
        """Return what is asked, but for a stored row.

        Raises
        ------
        DataError
            If the file cannot be read, or holds no record.
        """
        if self.text is not None:
            return [{"text": self.text}]
        if self.prompt is not None:
            return [{"prompt": self.prompt, "completion": self.completion}]
        assert self.file is not None, "a stored row is no record"
        return _read(self.file)


def _read(file: Path) -> list[Mapping[str, Any]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"--file: {file} cannot be read: {error.strerror}.") from error
    if file.suffix in _RECORDS:
        records: list[Mapping[str, Any]] = [record for _, record in read_objects(content, f"--file: {file}")]
        if not records:
            raise DataError(f"--file: {file} holds no record.")
        return records
    try:
        return [{"text": content.decode("utf-8-sig")}]
    except UnicodeDecodeError as error:
        raise DataError(f"--file: {file} cannot be read: it is no UTF-8 text.") from error


def query(session: Session, asked: Asked, k: int, *, truncate: bool, exact: bool = False) -> list[Answer]:
    """Answer what is asked: every record of a file that holds several; see `Session.query`."""
    if asked.index is not None:
        return [session.query(index=asked.index, k=k, exact=exact)]
    return session.query_all(asked.records(), k=k, truncate=truncate, exact=exact)


def render_answers(answers: Sequence[Answer], by: By) -> list[RenderableType]:
    """Draw answers for a terminal: of each query a table for every weighting, with the layers of the largest parts."""
    from rich.text import Text

    drawn: list[RenderableType] = []
    for answer in answers:
        label = "" if answer.label is None else f" [{one_line(answer.label, _NAME_LENGTH)}]"
        drawn.append(Text(f"{answer.query}{label}: {one_line(answer.text, _TEXT_LENGTH)}", style="bold"))
        if answer.screening is not None:
            drawn.append(Text(_found_by(answer.screening), style="dim"))
        drawn += [_table(answer, name, ranking, by) for name, ranking in answer.rankings.items()]
    return drawn


def _found_by(screening: Screening) -> str:
    """Tell how sure the candidates are."""

    def share(side: Side) -> str:
        return "not measured" if side.recall is None else f"{side.recall:.2f}"

    told = [
        f"{name} recall@{found.k} {share(found.proponents)} (opponents {share(found.opponents)})"
        for name, found in screening.candidates.items()
    ]
    return f"found through the sketch: {', '.join(told)} on {screening.queries} learn queries; --exact scores every row"


def _table(answer: Answer, name: str, ranking: Ranking, by: By) -> Table:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    winners = [*ranking.proponents, *ranking.opponents]
    scale = Scale(winner.score for winner in winners)
    title = f"{ranking_title(name)}, kernel {one_line(answer.kernel, _NAME_LENGTH)}"
    table = Table(title=Text(title, style="italic"), title_justify="left", box=None, expand=True)
    for column in ("rank", f"score {scale.unit}".rstrip()):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True)
    table.add_column("example, and what of the score comes through", ratio=1)
    for side, of in (("proponents", ranking.proponents), ("opponents", ranking.opponents)):
        table.add_row("", "", "", Text(side, style="dim"))
        for place, winner in enumerate(of, start=1):
            # Of texts alone only the beginning is shown.
            text = Text(one_line(winner.text, _TEXT_LENGTH), no_wrap=True, overflow="ellipsis")
            through = f"{one_line(winner.example_id, _NAME_LENGTH)}: {_through(answer, winner, by, scale)}"
            label = Text(one_line(winner.label or "", _LABEL_LENGTH))
            table.add_row(str(place), scale.score(winner.score), label, Group(text, Text(through, style="dim")))
    return table


def _through(answer: Answer, winner: Winner, by: By, scale: Scale) -> str:
    places = {group.name: group for group in answer.groups}
    shown = []
    for name, part in answer.layers(winner, by):
        group = places.get(str(name)) if by == "group" else None
        called = str(name)
        if group is not None and group.depth is not None:
            called = f"{group.depth}.{group.function}"
        shown.append(f"{one_line(called, _NAME_LENGTH)} {scale.part(part)}")
    return ", ".join(shown)
