"""Every error a user can cause. Each message says what came, what must hold, and what to do next.

The command line prints the message as one paragraph and ends with exit code 2; `--debug` adds the traceback.
"""


class NasError(Exception):
    """Base of all errors that are the input's or the machine's fault, not the program's."""


class ConfigError(NasError):
    """A TOML file has an unknown key, a wrong type or a value out of range."""


class SpaceError(NasError):
    """A search space cannot be built, or a genotype does not belong to it."""


class DataError(NasError):
    """The data set is missing, damaged, or not what the experiment says it is."""


class DeviceError(NasError):
    """A device or runtime is unknown or not installed on this machine."""


class UnmeasuredBlock(NasError):
    """A latency table was asked for a block that was never measured on its device."""


class LatencyError(NasError):
    """A latency table is damaged, drifted, or belongs to something else."""


class LimitError(NasError):
    """A limit that no network of the space can meet."""


class JournalError(NasError):
    """A search journal is damaged, or was written by another search."""


class CheckpointError(NasError):
    """A checkpoint or parameter file is damaged, belongs to another space, or could not be written."""


class Diverged(CheckpointError):
    """A training whose numbers are no longer finite."""


class RunError(NasError):
    """A run folder cannot be used: locked, of another configuration, not writable, or incomplete."""


class ExecutorError(NasError):
    """Workers cannot be started, keep dying, or starve."""


class EvaluateError(NasError):
    """An evaluation of one's own that fails for every network."""


class ExportError(NasError):
    """A network cannot be written in a format, or its file does not do what the network does."""
