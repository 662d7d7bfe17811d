"""Export to ONNX with the trained codes, and its verification."""
