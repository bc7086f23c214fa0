"""Context-parallel decode: a cache sharded along the sequence over several GPUs."""
