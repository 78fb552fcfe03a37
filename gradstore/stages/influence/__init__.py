"""influence and select: what every train example does to the eval queries or to itself, summed by label or source, or chosen by.

totals     what every train row does
stage      its sums by label or source, and the choice of rows
terminal   the table
"""

from gradstore.stages.influence.stage import influence, select
from gradstore.stages.influence.terminal import render_influence
from gradstore.stages.influence.totals import Asked, Influence, find_influence

__all__ = ["Asked", "Influence", "find_influence", "influence", "render_influence", "select"]
