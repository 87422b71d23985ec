"""Model families, their configuration and the registry that finds them by architecture name."""
