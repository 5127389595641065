"""Maps of whole scenes: windows on one lattice, blended into georeferenced rasters."""
