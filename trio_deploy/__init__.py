"""TRIO Deploy: token-reduced vision-language models as plain ONNX stages, pruned inside."""

__version__ = "0.1.0"
