"""Bits and blocks for each quantizer, from the error in the gradients."""
