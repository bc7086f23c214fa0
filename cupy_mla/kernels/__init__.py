"""The kernels as Python sees them: configurations, parameters, and which one serves a problem."""
