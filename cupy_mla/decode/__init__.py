"""Decoding: plans, prepared calls, merges, and the NumPy reference."""
