"""gradstore sketch and what gradstore query makes of it, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from gradstore.cluster import Engine
from gradstore.stages.contribute import contribute
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from tests.contributing import stored_c
from tests.runs import InThisProcess, gradstore
from tests.synthetic import make, synthesized


def test_a_query_is_answered_through_the_sketch_and_says_so_and_exactly_where_it_is_asked_to(tmp_path: Path) -> None:
    spec = make(tmp_path, rows=400, block_rows=64)
    store = synthesized(tmp_path, rows=400, block_rows=64)
    for stage in (build_kernel, contribute):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    run = tmp_path / "run.toml"
    run.write_text(run.read_text() + "\n[sketch]\ncandidates = 20\n")

    made = gradstore("sketch", run)
    assert made.returncode == 0, made.stderr
    assert "numbers a row" in made.stderr
    before = {info.path for info in store.storage.list_objects("")}
    answers = {}
    for options in ((), ("--exact",)):
        asked = gradstore("query", store.storage.url, "--index", "eval:1", "--k", "1", "--json", *options)
        assert asked.returncode == 0, asked.stderr
        (answers[options],) = json.loads(asked.stdout)["answers"]
    told = gradstore("query", store.storage.url, "--index", "eval:1", "--k", "1")

    assert answers[()]["sketch"]["candidates"]["unweighted"]["proponents"]["rows"] == 20
    assert answers[("--exact",)]["sketch"] is None
    assert "on 5 learn queries" in " ".join(told.stdout.split())
    best = int(stored_c(store, "eval", spec.kernel.name).mean(2)[1].argmax())
    for answer in answers.values():
        assert answer["rankings"]["unweighted"]["proponents"][0]["row"] == best
    assert {info.path for info in store.storage.list_objects("")} == before
    status = json.loads(gradstore("status", store.storage.url, "--json").stdout)
    assert [(row["path"], row["committed"]) for row in status["sketches"]] == [(f"sketches/{spec.kernel.name}", 9)]
    assert gradstore("verify", store.storage.url).returncode == 0
