"""plots: what was measured and learned, as pictures for papers and slides."""

from gradstore.stages.plots.stage import Picture, pictures_of, plots

__all__ = ["Picture", "pictures_of", "plots"]
