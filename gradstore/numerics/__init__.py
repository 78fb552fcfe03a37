"""The mathematics: arrays in, arrays out (tensors where a model runs); no files, no cluster, no run.toml.

One file per family, each with the dict in which run.toml's kinds are looked up: `outputs.OUTPUTS`,
`projection.PROJECTIONS`, `kernel.KERNELS`. Every random draw comes from `generator`.

Shape suffixes of locals and parameters, here and in the files below: B examples of a batch, T positions, V vocabulary,
O output features and I input features of a layer, R rank, Q queries, N rows (examples), M parameter groups, D or K
features of one group. ``gradient_BTO`` is indexed [example, position, output feature].

The files have no ``from __future__ import annotations``: tests check every shape at run time (jaxtyping and beartype),
which needs the annotations as objects.
"""
