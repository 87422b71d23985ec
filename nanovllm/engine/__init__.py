"""The engine: scheduler, block manager, model runner, executor and the loop that joins them."""
