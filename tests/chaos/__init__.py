"""Faults injected into real training programs, which must end as if nothing had happened: `python -m tests.chaos`."""
