"""Tiny encoders of texts with random weights, saved as transformers and sentence-transformers save real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import tiny_tokenizer

WIDTH, LAYERS, CONTEXT = 16, 2, 64


def make_tiny_encoder(folder: Path, *, seed: int = 0, width: int = WIDTH) -> Path:
    """Save a two-layer BERT, and the tiny tokenizer, into a folder."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=CONTEXT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_modules(folder: Path, *kinds: str, **configs: dict[str, Any]) -> None:
    """Write the modules.json of sentence-transformers beside an encoder, and the configuration of each of its modules."""
    modules = []
    for place, kind in enumerate(kinds):
        path = "" if kind == "Transformer" else f"{place}_{kind}"
        modules.append({"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"})
        if kind in configs:
            (folder / path).mkdir(exist_ok=True)
            (folder / path / "config.json").write_text(json.dumps(configs[kind]))
    (folder / "modules.json").write_text(json.dumps(modules))
