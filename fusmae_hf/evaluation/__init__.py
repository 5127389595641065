"""What reconstructions and features are worth."""
