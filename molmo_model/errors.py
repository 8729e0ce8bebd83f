"""The typed errors of the project.

A person catches `MolmoError` to catch everything this project raises on purpose. Every message names the
file, line, field or id at fault, both numbers where two disagree, and what to do about it.
"""


class MolmoError(Exception):
    """Base of every error raised on purpose by this project."""


class ConfigError(MolmoError):
    """`params.yaml`, an overlay or an override says something that cannot be run."""


class DataError(MolmoError):
    """A dataset, an example or a shard is not what its contract says."""


class ArtifactError(MolmoError):
    """An artefact directory is unfinished, corrupt, or made from other inputs than it claims."""


class CheckpointError(ArtifactError):
    """A checkpoint cannot be loaded, or does not fit the model or the params at hand."""


class StorageError(MolmoError):
    """A path or URL cannot be opened, listed or copied."""


class TrainingError(MolmoError):
    """A run went wrong on its way: a loss that is not finite, a rank that died."""


class EvaluationError(MolmoError):
    """Predictions, journals or metrics contradict each other or their task."""


class PreflightError(MolmoError):
    """What was asked for does not fit the machine; raised before any money is spent."""
