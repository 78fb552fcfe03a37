from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradstore.adapters.causal_lm import CausalLM
from gradstore.adapters.models.gguf import dequantise, dequantised_folder
from gradstore.errors import SpecError
from gradstore.spec import DataSection, ModelSection
from tests.models import SENTENCES, make_tiny_gguf, make_tiny_model

NAME = "tiny.gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def file(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file of the tiny model, and a cache of its own."""
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    return make_tiny_gguf(llama, tmp_path / "model" / NAME)


def _adapter(source: Path, gguf_file: str | None = None) -> CausalLM:
    splits: dict[str, object] = {"train": {"rows": 1}, "learn": {"rows": 1}, "eval": {"rows": 1}}
    return CausalLM(
        ModelSection(source=str(source), gguf_file=gguf_file), DataSection.model_validate({"source": "x", **splits}), 0
    )


def test_a_gguf_file_loads_as_the_model_it_was_made_from(llama: Path, file: Path) -> None:
    ours, theirs = _adapter(file.parent, NAME), _adapter(llama)

    weights, expected = ours.load("cpu").state_dict(), theirs.load("cpu").state_dict()

    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
    tokens, others = (adapter._tokenizer().encode(SENTENCES, special=True) for adapter in (ours, theirs))
    assert [row.tolist() for row in tokens] == [row.tolist() for row in others]


def test_a_gguf_file_is_dequantised_once_and_found_again_by_its_content(llama: Path, file: Path) -> None:
    folder = dequantise(file)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    copy = file.with_name("renamed.gguf")
    copy.write_bytes(file.read_bytes())

    assert dequantise(copy) == folder == dequantised_folder(file)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_shape_of_a_gguf_model_needs_no_dequantising(file: Path) -> None:
    shape = _adapter(file.parent, NAME).load("meta")

    assert not dequantised_folder(file).exists()
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}


def test_a_file_that_is_absent_or_no_gguf_is_refused_and_leaves_nothing_behind(file: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "noise.gguf").write_bytes(b"GGUF" + bytes(99))
    (tmp_path / "model" / "short.gguf").write_bytes(b"GGUFgarbage")

    with pytest.raises(SpecError, match=r"model\.gguf_file: .*absent\.gguf cannot be read: No such file"):
        _adapter(file.parent, "absent.gguf").load("cpu")
    with pytest.raises(SpecError, match=r"noise\.gguf cannot be read as a GGUF language model"):
        _adapter(file.parent, "noise.gguf").load("cpu")
    for device in ("cpu", "meta"):
        with pytest.raises(
            SpecError, match=r"short\.gguf cannot be read as a GGUF language model: (.*\n)Fetch the file"
        ):
            _adapter(file.parent, "short.gguf").load(device)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
