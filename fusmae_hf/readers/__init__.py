"""Readers of archives, one module a dataset, and what several of them share."""
