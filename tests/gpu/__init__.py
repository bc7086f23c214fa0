"""Tests that run kernels on a Hopper GPU."""
