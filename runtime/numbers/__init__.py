"""Formats, blocks, scales, rounding: how a number becomes a code and back."""
