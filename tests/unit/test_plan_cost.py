"""What a run costs on so many workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import SpecError
from gradstore.plan import Plan, make_plan
from gradstore.plan.cost import GPUS, Cost, Offer, cluster_of, estimate, offer_of
from gradstore.spec import RunSpec
from tests import synthetic


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, Plan]:
    spec = synthetic.make(tmp_path_factory.mktemp("run"), kernel="block")
    return spec, make_plan(spec)


def cost_of(planned: tuple[RunSpec, Plan], offer: Offer) -> Cost:
    return estimate(*planned, offer)


def test_hours_of_featurize_are_those_of_a_measured_rate(planned: tuple[RunSpec, Plan]) -> None:
    found = cost_of(planned, Offer(workers=4, rate=0.5, price=2.0))
    rows = 80 + 5 + 6
    assert found.hours["featurize"] == pytest.approx(rows / 0.5 / 4 / 3600)
    assert found.dollars == pytest.approx(4 * 2.0 * sum(found.hours.values()))
    assert found.assumptions[0] == "featurize: 0.5 rows a second by each worker (given)"


def test_hours_of_a_gpu_are_those_of_its_operations(planned: tuple[RunSpec, Plan]) -> None:
    _, plan = planned
    found = cost_of(planned, Offer(workers=1, gpu="A100"))
    operations = sum(4 * plan.partition.total_parameters * read.length * read.rows for read in plan.sets.values())
    assert found.hours["featurize"] == pytest.approx(operations / (0.35 * 312e12) / 3600)
    assert found.dollars == pytest.approx(GPUS["A100"].dollars * sum(found.hours.values()))
    assert any("35% of the 312 tera-operations" in line for line in found.assumptions)


def test_products_reads_and_decompositions_are_counted(planned: tuple[RunSpec, Plan]) -> None:
    found = cost_of(planned, Offer(workers=2, rate=1.0))
    rows, queries, groups, width = 80, 11, 8, 12
    reading = rows * groups * width * 2 / 5e8
    products = 2 * rows * groups * width * queries / 1e11
    kernel = 2 * rows * groups * width**2 / 1e11 + 4e-10 * groups * width**3
    c_of_a_query = rows * groups * 4 / 5e8
    seconds = {name: 3600 * hours for name, hours in found.hours.items()}
    assert seconds["contribute"] == pytest.approx((reading + products) / 2)
    assert seconds["kernel"] == pytest.approx((reading + kernel) / 2)
    assert seconds["learn"] == pytest.approx(4 * 5 * c_of_a_query)
    assert seconds["score"] == pytest.approx(6 * c_of_a_query)


@pytest.mark.parametrize("mode", ["streamed", "scores"])
def test_what_is_not_stored_is_built_at_each_reading(planned: tuple[RunSpec, Plan], mode: str) -> None:
    spec, plan = planned
    spec = spec.model_copy(update={"contribute": spec.contribute.model_copy(update={"mode": mode})})
    found = estimate(spec, plan, Offer(workers=2, rate=1.0)).hours
    rows, learned, asked, features = 80, 5, 6, 8 * 12
    reading, of_a_query = rows * features * 2 / 5e8, 2 * rows * features / 1e11
    hours = {name: 3600 * found[name] for name in ("contribute", "learn", "score") if name in found}
    if mode == "scores":
        assert hours == {"contribute": pytest.approx((reading + asked * of_a_query) / 2)}
    else:
        assert hours == {
            "contribute": pytest.approx((reading + learned * of_a_query) / 2),
            "learn": pytest.approx(4 * (reading + learned * of_a_query)),
            "score": pytest.approx(reading + asked * of_a_query),
        }


def test_no_price_is_made_up(planned: tuple[RunSpec, Plan]) -> None:
    found = cost_of(planned, Offer(workers=2, rate=1.0))
    assert found.dollars is None
    assert not any("$" in line and "worker and hour" in line for line in found.assumptions)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, "H100", None, None), "--workers: found 0; accepted: 1 or more"),
        ((2, "H1000", None, None), "--gpu: found 'H1000'; accepted: H200, H100"),
        ((2, None, None, None), "neither --gpu nor --rate says how fast one is"),
        ((2, None, 0.0, None), r"--rate: found 0\.0; accepted: a number above 0"),
        ((2, None, float("nan"), None), "--rate: found nan"),
        ((2, "H100", None, -1.0), r"--price: found -1\.0"),
        ((None, "H100", None, None), "--gpu: says what a worker is, but not how many there are"),
        ((None, None, None, 1.0), "--price: says what a worker is"),
    ],
)
def test_an_offer_that_says_too_little_is_refused(
    given: tuple[int | None, str | None, float | None, float | None], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        offer_of(*given)


def test_blocks_are_cut_for_the_workers_that_are_offered(planned: tuple[RunSpec, Plan]) -> None:
    section = cluster_of(planned[0], Offer(workers=7, gpu="L4"))
    assert (section.num_workers, section.device) == (7, "cuda")
    assert offer_of(None, None, None, None) is None


def test_the_command_tells_hours_money_and_assumptions(planned: tuple[RunSpec, Plan]) -> None:
    run = str(Path(planned[0].run.store).parent / "run.toml")
    offer = ["--workers", "2", "--gpu", "H100", "--price", "5"]
    shown = CliRunner().invoke(app, ["plan", run, *offer]).output
    assert "2 workers of one H100" in shown
    assert "assumed: featurize" in shown
    found = json.loads(CliRunner().invoke(app, ["plan", run, *offer, "--json"]).output)["cost"]
    assert found["offer"] == {"workers": 2, "gpu": "H100", "rate": None, "price": 5.0}
    assert found["total_hours"] == pytest.approx(sum(found["hours"].values()))
    assert found["dollars"] == pytest.approx(10 * found["total_hours"])
