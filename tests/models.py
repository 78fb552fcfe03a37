"""Tiny causal language models with random weights and a tokenizer trained here, saved as transformers saves real ones."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

Kind = Literal["llama", "gpt2"]

VOCABULARY = 300
CONTEXT = 64
END = "<|end|>"

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A journey of a thousand miles begins with a single step, said the old sailor.",
    "In 1998 the striker scored 24 goals, and the club finished second.",
    "Shares of the bank fell by 3% after the minister's speech.",
    "The new phone has two cameras; its battery lasts about a day.",
    "She sang the old song again, and the theatre was silent.",
)

# ChatML as most instruction-tuned models have it, with and without marks around what the assistant says.
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{{ message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_tiny_model(folder: Path, kind: Kind, *, seed: int = 0) -> Path:
    """Save a two-layer model of the kind, and its tokenizer, into the folder; it loads with the Auto classes.

    ``llama`` has nn.Linear layers without biases and grouped key-value heads; ``gpt2`` has Conv1D layers with biases,
    dropout of 0.1 and a tied head.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
        # Norm scales of exactly one and biases of exactly zero would hide mistakes.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_config(kind: Kind) -> PretrainedConfig:
    """Return the configuration of a tiny model."""
    from transformers import GPT2Config, LlamaConfig

    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    return LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 300 tokens, trained on a handful of sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def make_tiny_lora(folder: Path, model: Path, *, seed: int = 0, **options: Any) -> Path:
    """Save a LoRA adapter for a model in a folder; see `make_lora`."""
    from transformers import AutoModelForCausalLM

    return make_lora(folder, AutoModelForCausalLM.from_pretrained(model), seed=seed, **options)


def make_lora(folder: Path, model: nn.Module, *, seed: int = 0, **options: Any) -> Path:
    """Save a LoRA adapter of rank 3 with random factors, none of them zero, into a folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **options}
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT asks transformers by names that are to go.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def make_tiny_gguf(model: Path, file: Path) -> Path:
    """Write the weights (float32) and the tokenizer of a tiny ``llama`` as a GGUF file, laid out as llama.cpp does."""
    import gguf
    from safetensors.numpy import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads((model / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_token_list(vocabulary)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token == END] for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        count = heads.get(module.rpartition(".")[2])
        # llama.cpp pairs the rotated halves of a head next to each other.
        laid_out = weight if count is None else weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2)
        writer.add_tensor(f"{names.get_name(module)}.weight", laid_out.reshape(weight.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
