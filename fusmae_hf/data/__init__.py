"""Reading, simulating, storing and streaming pairs of Sentinel-1 and Sentinel-2 patches."""
