"""gradstore: an out-of-core store of per-example gradient features, and the training-data attribution built on it.

Importing it is cheap: what `open` and `open_contributions` need (xarray, pyarrow, Zarr) they import when they are called.
"""

from importlib.metadata import version

from gradstore.errors import GradstoreError
from gradstore.opening import open_contributions
from gradstore.opening import open_features as open  # noqa: A004 - read as gradstore.open
from gradstore.spec import RunSpec, read_spec

__version__ = version("gradstore")
__all__ = ["GradstoreError", "RunSpec", "__version__", "open", "open_contributions", "read_spec"]
