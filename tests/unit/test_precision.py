from __future__ import annotations

import pytest
import torch

from gradstore.adapters import resolve_precision


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_precision_that_is_named_is_taken_as_it_is(device: str) -> None:
    assert resolve_precision("float32", device) == "float32"
    assert resolve_precision("bfloat16", device) == "bfloat16"


def test_auto_on_a_processor_follows_its_instructions() -> None:
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))

    assert resolve_precision("auto", "cpu") == ("bfloat16" if has_bfloat16 else "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_auto_is_float32_on_a_device_that_is_not_there() -> None:
    assert resolve_precision("auto", "cuda") == "float32"
    assert resolve_precision("auto", "meta") == "float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_on_cuda_follows_the_compute_capability() -> None:
    major, _ = torch.cuda.get_device_capability()

    assert resolve_precision("auto", "cuda") == ("bfloat16" if major >= 8 else "float32")
