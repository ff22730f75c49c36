"""Serving a bundle with the Triton Inference Server: the repository and the models in it."""
