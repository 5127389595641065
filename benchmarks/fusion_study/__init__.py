"""Does the cross-attention fusion help? One study, at equal pretraining compute, of what could stand in its place.

See `__main__` for the commands, `variants` for what is compared and `evaluation` for how it is measured.
"""
