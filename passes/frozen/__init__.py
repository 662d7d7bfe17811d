"""Rewrites of an eval graph whose parameters and ranges are known."""
