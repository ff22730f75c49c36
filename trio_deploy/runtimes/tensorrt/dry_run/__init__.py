"""Checks of graphs against TensorRT's rules, without TensorRT."""
