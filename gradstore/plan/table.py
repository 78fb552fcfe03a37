"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradstore.plan import Plan
from gradstore.plan.dtypes import MEASURED_ON, SCORE_ERRORS
from gradstore.plan.sizes import gigabytes


def render_plan(plan: Plan) -> RenderableType:
    """Tables of the sets and stages of a plan, with its notes."""
    sets = Table("set", title="feature sets", title_justify="left")
    for column in ("rows", "blocks", "rows/block", "chunk", "bytes", "objects"):
        sets.add_column(column, justify="right")
    for planned in plan.sets.values():
        sets.add_row(
            f"{planned.name} ({planned.dtype})",
            f"{planned.rows:,}",
            f"{planned.blocks:,}",
            f"{planned.block_rows:,}",
            gigabytes(planned.largest_chunk_bytes),
            gigabytes(planned.feature_bytes),
            f"{planned.objects:,}",
        )
    dtypes = Table("dtype", title="train features in every dtype", title_justify="left")
    for column in ("bytes", "score error, identity", "block"):
        dtypes.add_column(column, justify="right")
    for name, stored_bytes in plan.dtype_bytes.items():
        error = SCORE_ERRORS[name]
        chosen = f"{name} (chosen)" if name == plan.sets["train"].dtype else name
        dtypes.add_row(chosen, gigabytes(stored_bytes), f"{error.identity:.2g}", f"{error.block:.2g}")
    stages = Table("stage", title="stages", title_justify="left")
    for column in ("tasks", "memory/task", "memory here", "writes", "objects"):
        stages.add_column(column, justify="right")
    for stage in plan.stages:
        stages.add_row(
            stage.name,
            f"{stage.tasks:,}",
            gigabytes(stage.task_memory_bytes) if stage.task_memory_bytes else "",
            gigabytes(stage.client_memory_bytes) if stage.client_memory_bytes else "",
            gigabytes(stage.written_bytes),
            f"{stage.objects:,}",
        )
    head = Text(
        f"{len(plan.partition.groups)} groups, {plan.features:,} features an example, "
        f"{gigabytes(plan.worker_memory_bytes)} of memory a worker"
    )
    measured = Text(f"score errors: root mean square, relative to float32, measured on {MEASURED_ON}")
    return Group(head, sets, dtypes, measured, stages, *(Text(f"- {note}") for note in (*plan.notes, *_skipped(plan))))


def _skipped(plan: Plan) -> list[str]:
    """One line per reason for which parameters are in no group."""
    by_reason: dict[str, list[float]] = {}
    for skipped in plan.partition.skipped:
        by_reason.setdefault(skipped.reason, []).append(skipped.share)
    return [f"skipped: {sum(s):.1%} of parameters in {len(s)} tensors: {reason}" for reason, s in by_reason.items()]
