"""Reading checkpoints: finding them, their tensors and their processor files."""
