from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradstore.adapters.models.gguf import dequantised_folder
from tests.models import make_tiny_gguf, make_tiny_model

pytestmark = pytest.mark.slow


def test_processes_that_dequantise_at_the_same_time_agree_on_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    file = make_tiny_gguf(make_tiny_model(tmp_path / "llama", "llama"), tmp_path / "tiny.gguf")
    program = f"from pathlib import Path; from gradstore.adapters.models.gguf import dequantise; print(dequantise(Path({str(file)!r})))"

    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in processes}

    assert folders == {str(dequantised_folder(file))}
    assert [process.returncode for process in processes] == [0, 0]
    assert [str(path) for path in dequantised_folder(file).parent.iterdir()] == list(folders)
