"""Kernels that multiply codes: one file a device, one table."""
