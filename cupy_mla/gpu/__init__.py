"""The chip and its driver: devices, compiling, loading and launching kernels."""
