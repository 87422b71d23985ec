"""Where engines run on a Ray cluster: GPU groups and placement. Used by `pipelines`; knows the engine's options, no job."""
