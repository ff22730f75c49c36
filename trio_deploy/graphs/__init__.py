"""Writing ONNX: dialects, modules and stages."""
