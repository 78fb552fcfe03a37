"""The health of a store: what is wrong with it, what is missing of it, what nothing names; mending it and tidying up.

problems   what can be wrong
ledger     what commits units: members of feature sets, artifacts
survey     one listing, and what the documents say
objects    one object against what is said of it
units      the units of a ledger, their records and their objects
check      all of it together
mend       broken units are taken back, metadata is written again
garbage    what dead writers left is removed
"""

from gradstore.store.health.check import Health, Orphans, Watch, check_store
from gradstore.store.health.garbage import Collected, collect
from gradstore.store.health.ledger import Ledger
from gradstore.store.health.mend import Mended, TakenBack, mend
from gradstore.store.health.problems import Problem
from gradstore.store.health.survey import Survey
from gradstore.store.health.units import Unit

__all__ = [
    "Collected",
    "Health",
    "Ledger",
    "Mended",
    "Orphans",
    "Problem",
    "Survey",
    "TakenBack",
    "Unit",
    "Watch",
    "check_store",
    "collect",
    "mend",
]
