"""Fus-MAE for transformers: a masked autoencoder that fuses Sentinel-1 and Sentinel-2 with cross-attention."""

__version__ = "0.1.0"
