"""Captured and rewritten graphs, kept on disk for the next process."""
