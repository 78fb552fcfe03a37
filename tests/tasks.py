"""Tasks of one's own with faults, and run.tomls of them: models and data that a run has to refuse, or to warn of."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.runs import toml

MODULE = "faulty_tasks"
TASKS = """
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional


    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))


    class Unseen(nn.Sequential):
        def __init__(self):
            super().__init__(Scale())

        def forward(self, x):
            return self[0].scale * x


    class Mixing(nn.Sequential):
        def forward(self, x):
            hidden = self[0](x)
            return self[1](hidden - hidden.mean(0))


    class Aside(nn.Sequential):
        def forward(self, x):
            return self[1](torch.tanh(self[0](x))) + functional.linear(x, self[1].weight)


    class Recurrent(nn.Sequential):
        def __init__(self, width):
            super().__init__(nn.Linear(3, 90), nn.Linear(90, 3), nn.LSTM(3, width, batch_first=True))

        def forward(self, x):
            return self[1](torch.tanh(self[0](x))) + self[2](x[:, None])[0].sum((1, 2))[:, None]


    MODELS = {
        "sound": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)),
        "without a layer": Unseen,
        "mixing": lambda: Mixing(nn.Linear(3, 5), nn.Linear(5, 3)),
        "aside": lambda: Aside(nn.Linear(3, 3), nn.Linear(3, 3)),
        "some LSTM": lambda: Recurrent(2),
        "mostly LSTM": lambda: Recurrent(40),
    }


    class Task:
        def __init__(self, model="sound", broken=()):
            self.model, self.broken = model, broken

        def load(self, source):
            torch.manual_seed(0)
            model = MODELS["sound" if self.model == "nan" else self.model]()
            if self.model == "nan":
                nn.init.constant_(model[2].weight, float("nan"))
            return model

        def examples(self, source):
            rng = np.random.default_rng(0)
            for row in range(60):
                x = rng.normal(size=3).astype(np.float32)
                x[0] = np.nan if row in self.broken else x[0]
                yield {"id": f"row-{row}", "inputs": {"x": x}}

        def output(self, model, batch):
            return model(batch["x"]).square().sum(1)


    def convolutions():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 3))
"""
TABLES: Mapping[str, Mapping[str, Any]] = {
    "data.train": {"rows": 40},
    "data.learn": {"rows": 10},
    "data.eval": {"rows": 10},
    "features": {"projection": {"kind": "logra", "rank": 2}, "block_rows": 16},
    "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
}


def write_run(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the module of tasks and a run.toml into a folder; return the run.toml."""
    (folder / f"{MODULE}.py").write_text(textwrap.dedent(TASKS), encoding="utf-8")
    every = {"run": {"name": "faulty", "store": str(folder / "store")}, **TABLES, **tables}
    path = folder / "run.toml"
    with path.open("w", encoding="utf-8") as file:
        for name, keys in every.items():
            file.write(f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in keys.items()))
    return path


def write_own_run(folder: Path, **arguments: Any) -> Path:
    """Write the run.toml of the module's own task, made with these arguments."""
    options = {"arguments": arguments}
    model = {"adapter": f"{MODULE}:Task", "source": "none", "precision": "float32", "options": options}
    return write_run(folder, {"model": model, "data": {"source": "rows", "shuffle": False}})
