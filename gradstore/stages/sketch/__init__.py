"""sketch: features + spectra -> a few numbers of every train row, by which queries find the rows worth scoring exactly."""

from gradstore.stages.sketch.stage import sketch

__all__ = ["sketch"]
