"""The one family of errors: each message names what came, what was expected and what to do."""

from __future__ import annotations


class FastpairError(Exception):
    """Anything that fastpair refuses; its text is one sentence that a user can act on."""


class ArgumentError(FastpairError, ValueError):
    """An argument or option has a value that cannot be used."""


class FileError(FastpairError):
    """A file is missing, damaged, of the wrong kind, or cannot be written."""


class DataError(FastpairError, ValueError):
    """A file is whole but what it holds cannot be used: NaN, unknown ids, rows out of range."""


class MismatchError(FastpairError):
    """Things that do not belong together: a table of one model with a table of another."""


class MemoryBudgetError(FastpairError):
    """The work does not fit into the memory that it was given."""


class AgreementError(FastpairError):
    """A backend's results are further from the reference than rounding can explain."""


class DeviceError(FastpairError):
    """A device that was asked for is not there, lacks something, or failed."""


class ClusterError(FastpairError):
    """A cluster, or a worker of it, is not there, cannot be used, or failed."""
