"""Attention backends, a file each; `nanovllm.layers.attention.select_backend` picks one."""
