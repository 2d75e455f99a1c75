"""Models from ONNX files, as programs."""
