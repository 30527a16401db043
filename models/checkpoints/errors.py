"""The one error of every checkpoint reader and writer."""


class CheckpointError(ValueError):
    """A file or folder that cannot be read as a checkpoint: damaged, incomplete, of another format or of another model."""
