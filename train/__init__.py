"""Training, data, evaluation and the command line."""
