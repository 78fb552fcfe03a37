"""A realistic report to draw: the shape of the demo, with texts made of words and numbers made of noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.stages.report import (
    UNWEIGHTED,
    Comparison,
    Group,
    MeasuredRow,
    PrecisionRow,
    QueryReport,
    RankedExample,
    ReportData,
    WeightVector,
)
from gradstore.stages.report.data import Side

FUNCTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LABELS = ("business", "entertainment", "politics", "sport", "tech")
WORDS = """
    the of a in and for to market minister film match software company said year growth record party award player
    network shares election director season phone bank policy music coach internet analysts economy
"""


def make_groups(num_depths: int = 30) -> list[Group]:
    """The linear layers of a Llama with ``num_depths`` blocks."""
    return [
        Group(name=f"model.layers.{depth}.{function}", depth=depth, function=function)
        for depth in range(num_depths)
        for function in FUNCTIONS
    ]


def make_report(
    *, num_queries: int = 60, k: int = 10, num_depths: int = 30, num_train: int = 400, texts: Sequence[str] = ()
) -> ReportData:
    """A report of the demo's shape; ``texts`` are shown first, among made-up ones of about 500 characters."""
    rng = np.random.default_rng(0)
    groups = make_groups(num_depths)
    shape = np.array([0.4, 0.4, 1.2, 1.5, 0.6, 0.8, 1.8])
    depth_M, function_M = np.divmod(np.arange(len(groups)), len(FUNCTIONS))
    raw_M = np.log(shape)[function_M] + 1.2 * np.sin(3 * depth_M / num_depths) + rng.normal(0, 0.25, len(groups))
    weights_M = np.exp(raw_M) / np.exp(raw_M).sum()
    texts = [*texts, *(_article(rng) for _ in range(num_train + num_queries - len(texts)))]
    labels = rng.choice(LABELS, num_train + num_queries)
    rankings = {UNWEIGHTED: np.full(len(groups), 1 / len(groups)), "learned": weights_M}
    queries = []
    for query in range(num_queries):
        parts_NM = rng.normal(0, 1, (num_train, len(groups))) * shape[function_M] * np.exp(depth_M / num_depths)
        alike = labels[:num_train] == labels[num_train + query]
        parts_NM += 0.12 * alike[:, None] * (depth_M / num_depths)
        queries.append(
            QueryReport(
                query_id=f"{labels[num_train + query]}/{query:03d}.txt",
                label=str(labels[num_train + query]),
                text=texts[query],
                rankings={
                    name: _rank(parts_NM * w_M * 1e-2, k=k, labels=labels, texts=texts[num_queries:])
                    for name, w_M in rankings.items()
                },
            )
        )
    return ReportData(
        name="quickstart",
        facts=[
            ("Model", "SmolLM2-135M-Instruct.Q4_1.gguf"),
            ("Train, learn, eval", "400, 60, 60 articles of 96 tokens"),
            ("Parameter groups", f"{len(groups)} linear layers, 79 % of the parameters"),
            ("Projection", "logra, rank 8, random, 64 features a group"),
            ("Kernel", "block, damping 0.1 of the mean eigenvalue"),
            ("Learning", "k 10, 10 epochs, learning rate 0.01"),
            ("Seed", "0"),
            ("Store", "runs/demo"),
            ("Features", "21.5 MB, float16"),
            ("Time", "featurize 90 s, whole run 3 min 12 s"),
        ],
        groups=groups,
        weights=[WeightVector(name="learned", weights=weights_M.tolist())],
        queries=queries,
        precision=[
            PrecisionRow(method="with learned weights", precision=0.53, chance=0.2),
            PrecisionRow(method="without weights", precision=0.57, chance=0.2),
            PrecisionRow(method="BM25", precision=0.71, chance=0.2),
            PrecisionRow(method="random", precision=0.19, chance=0.2),
        ],
        tail_patch=[
            MeasuredRow(method="with learned weights", mean=0.61, ci_low=0.22, ci_high=1.03, queries=10),
            MeasuredRow(method="without weights", mean=0.55, ci_low=0.18, ci_high=0.97, queries=10),
            MeasuredRow(method="BM25", mean=0.48, ci_low=0.11, ci_high=0.86, queries=10),
            MeasuredRow(method="random", mean=-0.04, ci_low=-0.31, ci_high=0.2, queries=10),
        ],
        comparisons=[
            Comparison(
                measure="tail-patch", weights="learned", difference=0.06, ci_low=0.011, ci_high=0.12, queries=10
            ),
            Comparison(
                measure="label precision@10",
                weights="learned",
                difference=-0.04,
                ci_low=-0.09,
                ci_high=0.0083,
                queries=60,
            ),
        ],
        notes=[
            "Topic is not causal effect: label precision says how alike texts are; word counts alone reach 0.73 here.",
            "Tail-patch is one optimizer step (AdamW, learning rate 1e-5) on ten queries: a small sample.",
        ],
    )


def _rank(parts_NM: np.ndarray, *, k: int, labels: np.ndarray, texts: Sequence[str]) -> list[RankedExample]:
    scores_N = parts_NM.sum(axis=1)
    order = np.argsort(-scores_N)
    sides: dict[Side, np.ndarray] = {"proponent": order[:k], "opponent": order[::-1][:k]}
    return [
        RankedExample(
            side=side,
            rank=rank,
            example_id=f"{labels[n]}/{n:03d}.txt",
            label=str(labels[n]),
            text=texts[n],
            score=float(scores_N[n]),
            parts=parts_NM[n].tolist(),
        )
        for side, best in sides.items()
        for rank, n in enumerate(best.tolist(), start=1)
    ]


def _article(rng: np.random.Generator) -> str:
    words = rng.choice(WORDS.split(), 85).tolist()
    lines = [" ".join(words[:5]), *(" ".join(words[start : start + 40]) + "." for start in (5, 45))]
    return "\n\n".join(line.capitalize() for line in lines)
