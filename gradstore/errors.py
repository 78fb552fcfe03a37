"""Every error gradstore raises on purpose, grouped by what its reader would do next.

    GradstoreError
    ├── SpecError           change run.toml
    ├── DataError           change the data, or how run.toml declares it
    ├── ContractError       the store was made otherwise: restore the settings or choose another store
    ├── ResourceError       it does not fit: choose smaller settings or a bigger machine
    ├── NotReadyError       an earlier stage has not finished: run it first
    ├── StorageError        the storage refused or failed: mend access, then run the same command again
    │   ├── ObjectMissingError   one named object is not there
    │   ├── IntegrityError       one named object is not what its checksum says
    │   └── SupersededError      what was being read or written was taken back meanwhile: run the same command again
    ├── TaskError           a task failed after its retries: run the same command again to resume
    ├── DoctorError         doctor found that the run's numbers would be wrong: mend what it names
    ├── DamageError         the store is damaged, or a change of it was not finished: do what is said of each object
    └── StoppedError        the user stopped it: run the same command again to resume

A message says what was found, where, and what to change. ``exit_code`` is what the command line returns.
"""

from __future__ import annotations

from typing import ClassVar


class GradstoreError(Exception):
    """The root of the tree; catch it to catch everything gradstore raises on purpose."""

    exit_code: ClassVar[int] = 1


class SpecError(GradstoreError):
    """run.toml asks for something that does not exist or does not hold together."""

    exit_code = 2


class DataError(GradstoreError):
    """The data is not what run.toml declares, or cannot be used as it is."""

    exit_code = 3


class ContractError(GradstoreError):
    """The store or artifact was made with other settings than the run asks for."""

    exit_code = 4


class ResourceError(GradstoreError):
    """The work does not fit the memory or the storage that the run may use."""

    exit_code = 5


class NotReadyError(GradstoreError):
    """A stage reads what an earlier stage has not finished."""

    exit_code = 6


class StorageError(GradstoreError):
    """The storage refused or failed a request."""

    exit_code = 7


class ObjectMissingError(StorageError):
    """An object that was asked for by name does not exist."""


class IntegrityError(StorageError):
    """The bytes of an object are not those that were written."""


class SupersededError(StorageError):
    """A repair or an erasure took back what was being read or written; a new attempt sees what is there now."""


class TaskError(GradstoreError):
    """A task failed after its retries; what was committed stays."""

    exit_code = 8


class DoctorError(GradstoreError):
    """A check of `gradstore doctor` failed: what the run would compute cannot be trusted, or it would not end."""

    exit_code = 9


class DamageError(GradstoreError):
    """Something in a store is not as it was committed, or a change of it was begun and not finished."""

    exit_code = 10


class StoppedError(GradstoreError):
    """The user interrupted the command; what was committed stays."""

    exit_code = 130
