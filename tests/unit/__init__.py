"""Fast tests: no GPU, no Ray."""
