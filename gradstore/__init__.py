"""gradstore: an out-of-core store of per-example gradient features, and the training-data attribution built on it.

Importing it is cheap, so that the command line is: what `open`, `open_contributions` and `open_scores` need (xarray, pyarrow, Zarr) they
import when they are called, and other names are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from gradstore.errors import GradstoreError
from gradstore.opening import open_contributions, open_scores
from gradstore.opening import open_features as open  # noqa: A004 - read as gradstore.open

if TYPE_CHECKING:
    from gradstore.spec import RunSpec, read_spec
    from gradstore.stages.query import Session

    __version__: str

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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gradstore")
    if name in ("RunSpec", "read_spec"):
        from gradstore import spec

        return getattr(spec, name)
    if name == "Session":
        from gradstore.stages.query import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
