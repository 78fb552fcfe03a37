"""GGUF files: dequantised once per machine, then loaded like any other model.

Dequantising takes a few hundred times as long as loading the result, and every worker loads the model.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.adapters.locations import cache_folder
from gradstore.errors import SpecError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# To be raised when what is written for a file changes.
_RECIPE = 1


def dequantised_folder(file: Path) -> Path:
    """Return the folder in gradstore's cache that holds, or will hold, the model and tokenizer of a GGUF file.

    Raises
    ------
    SpecError
        If there is no such file.
    """
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise SpecError(
            f"model.gguf_file: {file} cannot be read: {error.strerror}. Name a file inside model.source."
        ) from error
    return cache_folder() / "gguf" / f"{digest}-{_RECIPE}"


def dequantise(file: Path) -> Path:
    """Return the folder with the model and tokenizer of a GGUF file in float32, made if it is not there yet.

    Processes may do so at the same time: each writes a folder of its own, and the first to finish gives it its name.

    Raises
    ------
    SpecError
        If the file cannot be read as a GGUF file of a causal language model.
    """
    folder = dequantised_folder(file)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # The progress bars of transformers cannot all be turned off.
        with redirect_stderr(StringIO()):
            _write_dequantised(file, unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was first; what it wrote is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def read_config(file: Path) -> PretrainedConfig:
    """Return the configuration of the model of a GGUF file, without dequantising it.

    Raises
    ------
    SpecError
        If the file cannot be read as a GGUF file of a language model.
    """
    from transformers import AutoConfig

    with _explained(file):
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def _write_dequantised(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _explained(file):
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = quantised.config
    del config.quantization_config
    # transformers refuses to save the model it has just dequantised; an equal one without that history it saves.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    # A broken file makes its reader fail in any way: struct.error, IndexError, KeyError and others.
    except Exception as error:
        raise SpecError(
            f"model.gguf_file: {file} cannot be read as a GGUF language model: {error}\n"
            "Fetch the file again, or name another."
        ) from error
