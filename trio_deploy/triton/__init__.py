"""Import paths of Triton repositories written before 0.2."""
