"""NVIDIA's Triton Inference Server."""
