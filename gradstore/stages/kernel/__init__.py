"""kernel: features -> spectra. One task builds one bundle of groups over all blocks and commits it."""

from gradstore.stages.kernel.bundles import build_bundle
from gradstore.stages.kernel.stage import build_kernel

__all__ = ["build_bundle", "build_kernel"]
