"""gradstore: an out-of-core store of per-example gradient features, and the training-data attribution built on it.

Importing it is cheap: what `open`, `open_contributions` and `open_scores` need (xarray, pyarrow, Zarr) they import when they are called, and
`Session` is imported when it is first asked for.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from gradstore.errors import GradstoreError
from gradstore.opening import open_contributions, open_scores
from gradstore.opening import open_features as open  # noqa: A004 - read as gradstore.open
from gradstore.spec import RunSpec, read_spec

if TYPE_CHECKING:
    from gradstore.stages.query import Session

__version__ = version("gradstore")
__all__ = [
    "GradstoreError",
    "RunSpec",
    "Session",
    "__version__",
    "open",
    "open_contributions",
    "open_scores",
    "read_spec",
]


def __getattr__(name: str) -> object:
    if name == "Session":
        from gradstore.stages.query import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
