"""The passes from the quantized joint graph to the two halves that run."""
