"""The runs that docs/diffusion.md shows are runs, and their adapters take what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradstore.plan.resolve import make_adapter
from gradstore.spec import read_spec

PAGE = Path(__file__).parents[2] / "docs" / "diffusion.md"
RUNS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", RUNS, ids=["classes", "journey"])
def test_a_run_that_is_shown_is_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")

    spec = read_spec(path)

    for member in spec.model.etas:
        assert make_adapter(spec, member)


def test_every_option_is_on_the_page_or_one_of_all_images() -> None:
    import dataclasses

    from gradstore.adapters.diffusion.adapter import OUTPUT_NAMES
    from gradstore.adapters.diffusion.options import DiffusionOptions
    from gradstore.adapters.diffusion.sampler import Sampling

    page = PAGE.read_text(encoding="utf-8")
    names = [field.name for kind in (DiffusionOptions, Sampling) for field in dataclasses.fields(kind)]
    for name in {*names, *OUTPUT_NAMES} - {"size", "channels"}:
        assert re.search(rf"\b{name}\b", page), name
