"""Checkpoint formats: read as data, checked before use, written atomically."""
