"""Loading, forward context and validation helpers."""
