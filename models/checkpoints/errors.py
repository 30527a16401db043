"""The one error of every checkpoint reader and writer."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, of another format or of another model."""
