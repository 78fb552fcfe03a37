"""include: what a run.toml takes from others, methods by name, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradstore.errors import SpecError
from gradstore.plan.resolve import resolve_kernel, resolve_projection
from gradstore.spec import read_spec

METHODS = {
    "tracin": "identity",
    "trak": "full",
    "trak-block": "block",
    "logra": "block",
    "ekfac": "ekfac",
    "d-trak": "full",
    "journey-trak": "full",
    "das": "full",
    "representation": "identity",
}
BASE = """
[run]
name = "base"
store = "stores/base"
[model]
source = "nowhere:make"
[data]
source = "data.npz"
length = 64
train = { rows = 5 }
learn = { rows = 2 }
eval = { rows = 2 }
[learn]
k = 3
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / "run.toml"


def test_later_files_and_at_last_run_toml_itself_win_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"")
    run = write(
        tmp_path,
        base=BASE,
        more='include = ["base.toml"]\n[learn]\nepochs = 7\nweight_decay = [0.0, 1.0]\n[run]\nseed = 4\n',
        run='include = ["more.toml", "method:logra"]\n[run]\nname = "mine"\n[kernel]\ndamping = 2.0\n[learn]\nweight_decay = 0.5\n',
    )

    spec = read_spec(run)

    assert (spec.run.name, spec.run.seed, spec.data.train.length) == ("mine", 4, 64)
    assert (spec.learn.k, spec.learn.epochs, spec.learn.weight_decay) == (3, 7, 0.5)
    assert (spec.kernel.kind, spec.kernel.options) == ("block", {"damping": 2.0})
    assert spec.features.projection == {"kind": "logra", "rank": 16}
    # Paths are seen from the folder of run.toml.
    assert spec.data.train.source == str(tmp_path / "data.npz")


@pytest.mark.parametrize(("method", "kernel"), METHODS.items())
def test_methods_come_with_gradstore_and_resolve(tmp_path: Path, method: str, kernel: str) -> None:
    spec = read_spec(write(tmp_path, base=BASE, run=f'include = ["base.toml", "method:{method}"]\n'))

    assert spec.kernel.kind == kernel
    resolve_kernel(spec)
    resolve_projection(spec)
    adapters = {**dict.fromkeys(("d-trak", "journey-trak", "das"), "diffusion"), "representation": "text_encoder"}
    assert spec.model.adapter == adapters.get(method, "causal_lm")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            {"run": 'include = "base.toml"\n'},
            r"run\.toml: include: found 'base\.toml'; accepted: a list of files and of",
        ),
        ({"run": 'include = ["none.toml"]\n'}, r"none\.toml: no such file"),
        (
            {"run": 'include = ["method:magic"]\n'},
            r"found 'method:magic'; accepted methods: d-trak, das, ekfac, journey-trak",
        ),
        (
            {"run": 'include = ["a.toml"]\n', "a": 'include = ["run.toml"]\n'},
            r"a\.toml: include: run\.toml includes this file",
        ),
        ({"run": 'include = ["a.toml"]\n', "a": "k = [\n"}, r"a\.toml: not readable as TOML"),
    ],
)
def test_what_cannot_be_included_is_refused(tmp_path: Path, files: dict[str, str], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        read_spec(write(tmp_path, **files))
