"""Numbers, operators and execution."""
