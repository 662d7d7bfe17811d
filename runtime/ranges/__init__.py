"""Ranges: estimators, the states between steps, and the exchange between ranks."""
