"""A real model and a real corpus, from the packages that the demo installs them from."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from gradstore.adapters import ADAPTERS, Adapter, Examples
from gradstore.spec import read_spec

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart" / "run.toml"
TOPICS = {"business", "entertainment", "politics", "sports", "tech"}


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    spec = read_spec(QUICKSTART)
    return ADAPTERS[spec.model.adapter](spec.model, spec.data, spec.run.seed)


@pytest.fixture(scope="module")
def examples(adapter: Adapter) -> Examples:
    return adapter.examples()


def test_the_quickstart_reads_every_article_and_drops_the_duplicates(examples: Examples) -> None:
    (facts,) = examples.facts.sources

    assert (facts.documents, facts.duplicates, facts.empty, facts.short) == (2225, 101, 0, 0)
    rows = [example for split in examples.splits.values() for example in split]
    assert {example.label for example in rows} == TOPICS
    assert all(count == 1 for count in Counter(example.content_hash for example in rows).values())
    assert len({example.example_id for example in rows}) == len(rows)
    assert max(example.size for example in rows) == 96


def test_smollm2_is_dequantised_into_a_model_that_reads_news(adapter: Adapter, examples: Examples) -> None:
    model = adapter.load("cpu")
    evaluated = examples.splits["eval"][:12]

    with torch.no_grad():
        loss = float(adapter.outputs(model, evaluated).sum())
    perplexity = math.exp(loss / sum(example.size - 1 for example in evaluated))

    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    heads = adapter.output_heads(model)
    assert len(set(layers) - set(heads)) == 210
    assert heads == ("lm_head",)
    # A model whose heads were laid out wrongly, or with another tokenizer, has a perplexity of thousands.
    assert 20 < perplexity < 80


def test_the_output_of_an_article_does_not_depend_on_its_batch_mates(adapter: Adapter, examples: Examples) -> None:
    model = adapter.load("cpu")
    articles = list(examples.splits["eval"][:3])

    with torch.no_grad():
        together = adapter.outputs(model, articles)
        alone = torch.cat([adapter.outputs(model, [article]) for article in articles])

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)
