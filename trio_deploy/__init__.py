"""TRIO Deploy: token-reduced vision-language models as ONNX stages and TensorRT engines."""

__version__ = "0.1.0"
