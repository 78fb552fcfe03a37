"""gradstore: an out-of-core store of per-example gradient features, and the training-data attribution built on it."""

from importlib.metadata import version

from gradstore.errors import GradstoreError
from gradstore.spec import RunSpec, read_spec

__version__ = version("gradstore")
__all__ = ["GradstoreError", "RunSpec", "__version__", "read_spec"]
