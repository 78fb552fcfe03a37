"""weights: what weights a store holds, in tables, in files and drawn along the depth of the model.

stage      plain values, and the files that hold them
picture    weights drawn, as an SVG or a page
terminal   tables
"""

from gradstore.stages.show_weights.stage import show_weights, write_weights
from gradstore.stages.show_weights.terminal import render_candidates, render_weights

__all__ = ["render_candidates", "render_weights", "show_weights", "write_weights"]
