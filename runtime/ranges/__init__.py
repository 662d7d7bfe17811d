"""Ranges: estimators, what they keep between steps, and how ranks agree on them."""
