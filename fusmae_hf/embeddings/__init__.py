"""Vectors of places: tables that GIS and data frames open, and vectors in eight bits."""
