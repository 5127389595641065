"""Pictures of pairs, of what a model does, and of scores."""
