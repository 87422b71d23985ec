"""The parts models are made of. Every layer that is sharded takes its `TensorParallel` (rank, size) as an argument."""
