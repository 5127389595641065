"""Fus-MAE in other frameworks of the field, a module each that is imported only by those who use it."""
