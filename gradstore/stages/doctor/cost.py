"""Looks at what the run covers and costs: parameters, memory, speed, and the whole of it."""

from __future__ import annotations

from gradstore.plan.sizes import gigabytes
from gradstore.stages.doctor.measure import PeakMemory, plain_pass, seconds_of
from gradstore.stages.doctor.patient import Patient
from gradstore.stages.doctor.report import Check, Verdict

# Plain passes that one pass for features may cost; no projection needs more on models of a real size.
SLOW = 5.0
SHOWN = 3


def look_at_coverage(patient: Patient) -> Check:
    """Share of the parameters that are in a group, and why the others are not."""
    partition = patient.plan.partition
    lost = [item for item in partition.skipped if not item.chosen]
    reasons: dict[str, list[float]] = {}
    for item in partition.skipped:
        reasons.setdefault(item.reason, []).append(item.share)
    summary = (
        f"{partition.coverage:.1%} of {partition.total_parameters:,} parameters are in {len(partition.groups):,} groups"
    )
    if lost:
        largest = sorted(lost, key=lambda item: -item.parameters)[:SHOWN]
        shown = "; ".join(f"{item.name} ({item.reason})" for item in largest)
        share = sum(item.share for item in lost)
        summary += f"; of {share:.1%} in {len(lost):,} tensors no gradient can be taken: {shown}"
    return Check(
        name="coverage",
        verdict="warning" if lost else "ok",
        summary=f"{summary}.",
        figures={
            "coverage": partition.coverage,
            "groups": len(partition.groups),
            "unsupported": [item.name for item in lost],
            "skipped": {reason: {"tensors": len(shares), "share": sum(shares)} for reason, shares in reasons.items()},
        },
    )


def look_at_memory(patient: Patient) -> Check:
    """Memory of one batch at its highest, beside what the plan expects of a task of featurize."""
    with PeakMemory(patient.loaded.device) as peak:
        patient.loaded.compute(patient.batch, training=True)
    planned = next(stage.task_memory_bytes for stage in patient.plan.stages if stage.name == "featurize")
    limit, highest = patient.plan.worker_memory_bytes, max(peak.process_bytes, peak.device_bytes or 0)
    device = "" if peak.device_bytes is None else f" and {gigabytes(peak.device_bytes)} of the device's"
    summary = (
        f"{gigabytes(peak.process_bytes)} of this process's memory{device} at the highest; the plan expects "
        f"{gigabytes(planned)} of a task, a worker may use {gigabytes(limit)}."
    )
    verdict: Verdict = "ok" if highest <= planned else "warning"
    if peak.process_bytes > limit:
        verdict = "failed"
        summary += (
            " Lower features.token_budget, or give workers more: cluster.memory_per_worker, or fewer cluster.workers."
        )
    return Check(
        name="memory",
        verdict=verdict,
        summary=summary,
        figures={
            "peak_bytes": peak.process_bytes,
            "device_peak_bytes": peak.device_bytes,
            "planned_bytes": planned,
            "worker_bytes": limit,
        },
    )


def look_at_speed(patient: Patient) -> Check:
    """Rows and tokens a second, beside a plain forward and backward pass of the same batch."""
    batch, loaded, seconds = patient.batch, patient.loaded, patient.seconds
    ratio = seconds / seconds_of(lambda: plain_pass(loaded, batch), loaded.device)
    tokens = sum(example.size for example in batch)
    slow = ratio > SLOW
    advice = " That is much, unless the model is tiny: a projection with fewer features is faster." if slow else ""
    return Check(
        name="speed",
        verdict="warning" if slow else "ok",
        summary=(
            f"{len(batch) / seconds:,.1f} rows and {tokens / seconds:,.0f} tokens a second in batches of {len(batch):,}, "
            f"{ratio:.2f} of the time of a plain forward and backward pass.{advice}"
        ),
        figures={
            "rows_per_second": len(batch) / seconds,
            "tokens_per_second": tokens / seconds,
            "batch_rows": len(batch),
            "ratio_to_plain": ratio,
        },
    )


def look_ahead(patient: Patient) -> Check:
    """Time of featurize, and bytes and objects of the whole run."""
    plan, workers = patient.plan, patient.spec.cluster.num_workers
    rows = len(patient.spec.model.etas) * sum(planned.rows for planned in plan.sets.values())
    seconds = rows * patient.seconds / len(patient.batch) / workers
    written = sum(stage.written_bytes for stage in plan.stages)
    objects = sum(stage.objects for stage in plan.stages)
    return Check(
        name="forecast",
        verdict="ok",
        summary=(
            f"featurize takes about {_duration(seconds)} for {rows:,} rows with {workers:,} workers like this process; the "
            f"whole run writes {gigabytes(written)} in {objects:,} objects."
        ),
        figures={"rows": rows, "workers": workers, "seconds": seconds, "bytes": written, "objects": objects},
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
