"""Whole models: the decoder, wrappers, checkpoint formats and conversion."""
