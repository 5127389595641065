"""Simulated pairs: land cover, what the two sensors see of it, and pairs with labels."""
