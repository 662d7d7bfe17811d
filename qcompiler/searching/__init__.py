"""Bits and blocks for each quantizer, from the error that it makes."""
