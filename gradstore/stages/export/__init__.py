"""export: features of some groups and rows of a set, written to one file for other tools."""

from gradstore.stages.export.selection import Selection
from gradstore.stages.export.stage import Room, export

__all__ = ["Room", "Selection", "export"]
