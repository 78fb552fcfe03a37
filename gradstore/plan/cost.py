"""Hours and money that a run takes on so many workers, from a measured or a stated rate, with what is assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gradstore.errors import SpecError
from gradstore.plan import Plan
from gradstore.plan.contributions import contributed_sets
from gradstore.plan.kernels import SECONDS_PER_CUBE
from gradstore.plan.sizes import ITEM_BYTES, PUT_DOLLARS, Widths, gigabytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradstore.spec import ClusterSection, RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What is stated of a kind of GPU: dense bfloat16 operations a second at its peak, memory, and dollars an hour."""

    peak: float
    memory_bytes: float
    dollars: float


# Peaks are those of the vendor's data sheets, without sparsity; prices are of the order that clouds ask on demand.
GPUS: Mapping[str, Gpu] = {
    "H200": Gpu(peak=989e12, memory_bytes=141e9, dollars=4.0),
    "H100": Gpu(peak=989e12, memory_bytes=80e9, dollars=3.0),
    "A100": Gpu(peak=312e12, memory_bytes=80e9, dollars=1.8),
    "L40S": Gpu(peak=362e12, memory_bytes=48e9, dollars=1.2),
    "L4": Gpu(peak=121e12, memory_bytes=24e9, dollars=0.7),
}
UTILISATION = 0.35
PRECISION_BYTES = 2
# Forward 2, gradients of inputs 2: no weight gradients are formed.
OPERATIONS = 4
# A worker's one thread in float32, and what it reads from storage.
THREAD_RATE = 1e11
READ_BYTES_A_SECOND = 5e8
LEARN_READS = 4
STORAGE_DOLLARS_GB_MONTH = 0.023
# What comes after contribute, by its mode.
_LATER: Mapping[str, str] = {
    "tensor": f"learn reads C {LEARN_READS} times and score once, in one process at the same rate",
    "streamed": f"C is not stored: learn builds it {LEARN_READS} times and score once, in one process at the same rate",
    "scores": "nothing is learned, and scores are made as C is",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a run would be given.

    Attributes
    ----------
    workers
        How many, of one GPU each if ``gpu`` is given.
    gpu
        A name of GPUS.
    rate
        Rows a second that one worker featurizes, as `gradstore doctor` measures it; in place of what a GPU is assumed to do.
    price
        Dollars for one worker and hour, in place of the stated ones.
    """

    workers: int
    gpu: str | None = None
    rate: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise SpecError(f"--workers: found {self.workers}; accepted: 1 or more.")
        if self.gpu is not None and self.gpu not in GPUS:
            raise SpecError(f"--gpu: found {self.gpu!r}; accepted: {', '.join(GPUS)}, or leave it out and give --rate.")
        if self.gpu is None and self.rate is None:
            raise SpecError(
                "--workers: neither --gpu nor --rate says how fast one is. Give --gpu KIND, or --rate with the rows a second "
                "that `gradstore doctor` measures."
            )
        for name, value in (("--rate", self.rate), ("--price", self.price)):
            if value is not None and not 0 < value < float("inf"):
                raise SpecError(f"{name}: found {value}; accepted: a number above 0.")


def offer_of(workers: int | None, gpu: str | None, rate: float | None, price: float | None) -> Offer | None:
    """Return what the command line offers, or None if it says nothing of it.

    Raises
    ------
    SpecError
        If it says something, but not how many workers and how fast one is.
    """
    if workers is None:
        if given := [name for name, value in (("gpu", gpu), ("rate", rate), ("price", price)) if value is not None]:
            raise SpecError(f"--{given[0]}: says what a worker is, but not how many there are. Add --workers.")
        return None
    return Offer(workers=workers, gpu=gpu, rate=rate, price=price)


def cluster_of(spec: RunSpec, offer: Offer) -> ClusterSection:
    """Return [cluster] with as many workers as are offered, by which blocks are cut."""
    device = "cuda" if offer.gpu is not None else spec.cluster.device
    return spec.cluster.model_copy(update={"workers": offer.workers, "device": device})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Hours of every stage, what all of it costs, and on which assumptions; ``dollars`` is None where no price is known."""

    offer: Offer
    hours: Mapping[str, float]
    dollars: float | None
    request_dollars: float
    storage_dollars_month: float
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "hours": dict(self.hours), "total_hours": sum(self.hours.values())}


def estimate(spec: RunSpec, plan: Plan, offer: Offer) -> Cost:
    """Estimate what a planned run takes.

    featurize computes 4 P T operations for a row of T tokens under P parameters, on each of E members; a kernel that keeps
    spectra N sum_j k_j^2 products and a decomposition of each group; contribute N D Q products; learn and score read C in one
    process, or build it there at each read where it is not stored. Where scores alone are kept, contribute is the last.

    Raises
    ------
    SpecError
        If the model does not fit the GPU.
    """
    gpu = None if offer.gpu is None else GPUS[offer.gpu]
    weights = PRECISION_BYTES * plan.partition.total_parameters
    if gpu is not None and weights > gpu.memory_bytes:
        raise SpecError(
            f"--gpu: the model's weights take {gigabytes(weights)} in bfloat16, {offer.gpu} has "
            f"{gigabytes(gpu.memory_bytes)}. Choose one with more memory."
        )
    rate, told = _rate(plan, offer)
    hours = {name: seconds / 3600 for name, seconds in _seconds(spec, plan, offer.workers, rate).items()}
    price = offer.price if offer.price is not None else None if gpu is None else gpu.dollars
    written = sum(stage.written_bytes for stage in plan.stages)
    assumptions = [
        told,
        f"kernel and contribute: {THREAD_RATE:.0e} operations a second and {READ_BYTES_A_SECOND / 1e9:.1f} GB/s read by each "
        f"worker; {_LATER[spec.contribute.mode]}",
        "nothing waits for a queue or starts anew, and workers share the rows evenly",
        f"storage at ${STORAGE_DOLLARS_GB_MONTH} a GB and month, ${PUT_DOLLARS * 1000:.3f} for 1,000 objects written",
    ]
    if price is not None:
        stated = "given" if offer.price is not None else "a stated one: prices differ and change"
        assumptions.insert(1, f"${price:.2f} for a worker and hour, all stages through ({stated})")
    if plan.kernel.across_groups:
        assumptions.append("the kernel across groups is not estimated: time it on a synthetic store (docs/sizing.md)")
    return Cost(
        offer=offer,
        hours=hours,
        dollars=None if price is None else price * offer.workers * sum(hours.values()),
        request_dollars=PUT_DOLLARS * sum(stage.objects for stage in plan.stages),
        storage_dollars_month=STORAGE_DOLLARS_GB_MONTH * written / 1e9,
        assumptions=tuple(assumptions),
    )


def _rate(plan: Plan, offer: Offer) -> tuple[float, str]:
    """Rows of the train set that one worker featurizes a second, and why."""
    if offer.rate is not None:
        return offer.rate, f"featurize: {offer.rate:,.4g} rows a second by each worker (given)"
    assert offer.gpu is not None, "Offer refuses neither"
    length, peak = plan.sets["train"].length, GPUS[offer.gpu].peak
    rate = UTILISATION * peak / (OPERATIONS * plan.partition.total_parameters * length)
    return rate, (
        f"featurize: {rate:,.4g} rows a second by each worker: {OPERATIONS} operations for each of "
        f"{plan.partition.total_parameters:,} parameters and {length:,} tokens of a row, {UTILISATION:.0%} of the "
        f"{peak / 1e12:,.0f} tera-operations a second of one {offer.gpu}; where `gradstore doctor` measured a rate, give it by "
        "--rate"
    )


def _seconds(spec: RunSpec, plan: Plan, workers: int, rate: float) -> dict[str, float]:
    """Wall seconds of every stage."""
    train, members = plan.sets["train"], len(spec.model.etas)
    # Rows of other lengths than those of the train set take accordingly.
    rows = sum(planned.rows * planned.length / max(train.length, 1) for planned in plan.sets.values())
    reading = train.feature_bytes / READ_BYTES_A_SECOND
    found = {"featurize": members * rows / rate / workers}
    if plan.kernel.needs_spectra and not plan.kernel.across_groups:
        found["kernel"] = (reading + members * _kernel_seconds(plan, train.rows)) / workers
    sets = contributed_sets(spec)
    built = {name: 2 * members * train.rows * plan.features * plan.sets[name].rows / THREAD_RATE for name in plan.sets}
    found["contribute"] = (reading + sum(built[name] for name in sets)) / workers
    if spec.contribute.mode == "scores":
        return found
    item = ITEM_BYTES[spec.contribute.dtype]
    of_a_query = train.rows * len(plan.partition.groups) * item / READ_BYTES_A_SECOND
    for stage, names, reads in (("learn", spec.data.learn_sets(), LEARN_READS), ("score", ("eval",), 1)):
        if spec.contribute.mode == "streamed":
            found[stage] = reads * sum(reading + built[name] for name in names)
        else:
            found[stage] = reads * of_a_query * sum(plan.sets[name].rows for name in names)
    return found


def _kernel_seconds(plan: Plan, rows: int) -> float:
    """Seconds of one worker for the sums and decompositions of all groups of a member."""
    widths = Widths.of(plan.projection, plan.partition.groups)
    if plan.kernel.basis == "vectors":
        sums = 2 * rows * sum(width**2 for width in widths.full)
        cubes = sum(width**3 for width in widths.full)
    elif plan.kernel.basis == "kronecker":
        sides = [part for group in widths.sides for part in group]
        sums = 4 * rows * sum(out * inner * (out + inner) for out, inner in sides)
        cubes = sum(side**3 for part in sides for side in part)
    else:
        sums, cubes = 2 * rows * sum(widths.full), 0
    return sums / THREAD_RATE + SECONDS_PER_CUBE * cubes


def render_cost(cost: Cost) -> RenderableType:
    """Return the hours of every stage as a table, with the sum, the money and what is assumed."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    gpu = "" if cost.offer.gpu is None else f" of one {cost.offer.gpu}"
    table = Table("stage", title=f"{cost.offer.workers:,} workers{gpu}", title_justify="left")
    table.add_column("hours", justify="right")
    for name, hours in cost.hours.items():
        table.add_row(name, _hours(hours))
    table.add_row("all", _hours(sum(cost.hours.values())))
    money = [f"${cost.request_dollars:,.2f} for requests", f"${cost.storage_dollars_month:,.2f} a month for storage"]
    if cost.dollars is not None:
        money.insert(0, f"${cost.dollars:,.2f} for workers")
    return Group(table, Text(", ".join(money)), *(Text(f"- assumed: {line}") for line in cost.assumptions))


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.01 else "< 0.01"
