"""Runs that are killed at random, again and again, and must end as if nothing had happened."""
