"""Rewrites of an ONNX model in memory, between torch's exporter and the file."""
