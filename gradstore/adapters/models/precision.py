"""In what precision a model is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Precision = Literal["float32", "bfloat16"]


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"], device: str) -> Precision:
    """Return the precision that ``auto`` stands for on a device: bfloat16 where the device computes in it.

    That is a CUDA device of compute capability 8.0 or later, or a processor with AVX512-BF16, AMX or the ARM bfloat16
    instructions. Elsewhere bfloat16 is emulated, and slower than float32. What is named outright is returned as it is.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if _computes_in_bfloat16(device) else "float32"


def _computes_in_bfloat16(device: str) -> bool:
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Older torch cannot tell; float32 is right everywhere.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return kind == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
