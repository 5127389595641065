"""The small shards and checkpoint of the training tests."""

from tests.training.conftest import checkpoint, labelled, shards

__all__ = ["checkpoint", "labelled", "shards"]
