"""Runs with several shares of labels and seeds, and their table."""
