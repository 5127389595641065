"""Cards, checkpoints and pushing to the Hub."""
