"""The labelled shards and the checkpoint of the training tests."""

from tests.training.conftest import checkpoint, labelled

__all__ = ["checkpoint", "labelled"]
