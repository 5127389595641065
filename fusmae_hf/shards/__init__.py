"""Prepared pairs on disk: their format, how they are written, read and ordered."""
