"""status: what a store holds, and how far each part is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradstore.store.artifacts import ScoresArtifact, list_artifacts, stale_blocks
from gradstore.store.codecs import as_written
from gradstore.store.features import FeatureStore
from gradstore.store.jobs import Jobs
from gradstore.store.layout import ARTIFACT_FILE

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradstore.store.artifacts import ArtifactStatus

# By path of a stale artifact and by set/member, the blocks that have changed.
Stale = Mapping[str, Mapping[str, list[int]]]


def status(store_url: str) -> dict[str, Any]:
    """Plain values: feature sets, kernels and everything that is made with them, and how the rankings do.

    Raises
    ------
    NotReadyError
        If there is no store at the URL.
    """
    store = FeatureStore.open(store_url)
    artifacts = list_artifacts(store.storage)
    stale = stale_blocks(store, artifacts)
    rankings = [_ranking(store, artifact, stale) for artifact in artifacts if artifact.kind == "scores"]
    return {
        "store": store.storage.url,
        "name": store.run["run"]["name"],
        "feature_sets": [_feature_set(store, name) for name in store.set_names()],
        "kernels": [_progress(artifact, stale) for artifact in artifacts if artifact.kind in ("kernel", "full_kernel")],
        **{
            key: [_progress(artifact, stale) for artifact in artifacts if artifact.kind == kind]
            for key, kind in (
                ("queries", "queries"),
                ("self_influence", "self_influence"),
                ("moments", "moments"),
                ("score_matrices", "score_matrix"),
                ("sketches", "sketch"),
                ("embeddings", "embeddings"),
            )
        },
        **{
            key: _together([artifact for artifact in artifacts if artifact.kind == kind])
            for key, kind in (("retrained", "retrained"), ("patched", "patched"), ("evaluations", "evaluation"))
        },
        "contributions": [
            _contributions(artifact, stale) for artifact in artifacts if artifact.kind == "contributions"
        ],
        "weights": [_weights(artifact, stale) for artifact in artifacts if artifact.kind == "weights"],
        "scores": [ranking for ranking in rankings if ranking["kernel"] is not None],
        "baselines": [
            {key: value for key, value in ranking.items() if key not in ("kernel", "weights")}
            for ranking in rankings
            if ranking["kernel"] is None
        ],
        "jobs": [sight.id for sight in Jobs(store.storage).sights()],
    }


def _feature_set(store: FeatureStore, name: str) -> dict[str, Any]:
    feature_set = store.open_set(name)
    info = feature_set.info
    total = info.num_blocks * len(info.members)
    missing = sum(len(feature_set.of_member(member).missing_blocks()) for member in info.members)
    return {
        "name": name,
        "rows": info.num_examples,
        "groups": len(info.arrays),
        "features": sum(array.features for array in info.arrays),
        "dtype": info.dtype,
        "block_rows": info.block_rows,
        "members": list(info.members),
        "blocks": {"committed": total - missing, "total": total},
    }


def _progress(artifact: ArtifactStatus, stale: Stale) -> dict[str, Any]:
    return {
        "name": artifact.name,
        "path": artifact.path,
        "committed": artifact.committed,
        "total": artifact.total,
        "stale": stale.get(artifact.path, {}),
    }


def _together(artifacts: Sequence[ArtifactStatus]) -> list[dict[str, Any]]:
    """Of many small artifacts of one unit, such as retrained models: by the folder that they are in, how many are done."""
    folders: dict[str, list[bool]] = {}
    for artifact in artifacts:
        done = artifact.committed == artifact.total
        folders.setdefault(artifact.path.rpartition("/")[0], []).append(done)
    return [{"path": path, "committed": sum(done), "total": len(done)} for path, done in folders.items()]


def _contributions(artifact: ArtifactStatus, stale: Stale) -> dict[str, Any]:
    kernel, _, queries = artifact.name.partition("/")
    with as_written(f"{artifact.path}/{ARTIFACT_FILE}", "`gradstore verify` says what to do with it."):
        shape = artifact.settings["shape"]
        return {
            **_progress(artifact, stale),
            "kernel": kernel,
            "kernel_settings": artifact.settings["kernel"],
            "set": queries,
            "shape": [shape["queries"], shape["rows"], len(shape["groups"])],
        }


def _weights(artifact: ArtifactStatus, stale: Stale) -> dict[str, Any]:
    return {
        **_progress(artifact, stale),
        "kernel": artifact.settings["kernel"],
        "learner": artifact.settings["learner"],
    }


def _ranking(store: FeatureStore, artifact: ArtifactStatus, stale: Stale) -> dict[str, Any]:
    """Summary of one ranking; its figures are None until it is committed."""
    if artifact.committed < artifact.total:
        kernel, _, method = artifact.name.partition(".")
        summary: Mapping[str, Any] = {"kernel": None if kernel == "baseline" else kernel, "method": method}
    else:
        summary = ScoresArtifact.open(store.storage, artifact.name).read_summary()
    patch = summary.get("tail_patch")
    kept = ("mean", "low", "high", "queries", "k", "optimizer", "learning_rate")
    return {
        "name": artifact.name,
        "path": artifact.path,
        "method": summary["method"],
        "kernel": summary["kernel"],
        "weights": summary.get("weights"),
        "precision_at_10": summary.get("precision_at_10"),
        "chance": summary.get("chance"),
        "tail_patch": None if patch is None else {key: patch[key] for key in kept},
        "committed": artifact.committed,
        "total": artifact.total,
        "stale": stale.get(artifact.path, {}),
    }


def render_status(found: Mapping[str, Any]) -> RenderableType:
    """Draw a status as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts = Table("part", title=f"{found['name']} in {found['store']}", title_justify="left")
    for column in ("done", "of", "what"):
        parts.add_column(column, justify="left" if column == "what" else "right")
    for row in found["feature_sets"]:
        what = f"{row['rows']:,} rows, {row['groups']:,} groups, {row['features']:,} features, {row['dtype']}"
        parts.add_row(
            f"features/{row['name']}", str(row["blocks"]["committed"]), str(row["blocks"]["total"]), f"{what}; blocks"
        )
    for kind, unit in (
        ("kernels", "bundles"),
        ("self_influence", "chunks"),
        ("contributions", "blocks"),
        ("moments", "spans"),
        ("score_matrices", "blocks"),
        ("sketches", "parts"),
        ("weights", ""),
        ("scores", ""),
        ("embeddings", "blocks"),
        ("retrained", "models"),
        ("patched", "queries"),
        ("evaluations", "methods"),
    ):
        for row in found[kind]:
            what = f"{unit}; stale, see `gradstore prune`" if row.get("stale") else unit
            parts.add_row(row["path"], str(row["committed"]), str(row["total"]), what)
    figures = Table("ranking", title="rankings of the eval queries", title_justify="left")
    for column in ("precision@10", "tail-patch %"):
        figures.add_column(column, justify="right")
    for row in (*found["scores"], *found["baselines"]):
        figures.add_row(row["name"], _figure(row["precision_at_10"]), _interval(row["tail_patch"]))
    rows = [*found["scores"], *found["baselines"]]
    return Group(parts, figures) if rows else Group(parts, Text("no scores yet"))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(patch: Mapping[str, Any] | None) -> str:
    return "" if patch is None else f"{patch['mean']:+.3f} [{patch['low']:+.3f}, {patch['high']:+.3f}]"
