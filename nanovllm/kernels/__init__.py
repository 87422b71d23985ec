"""Kernels, one idea a file, each with its plain-torch reference."""
