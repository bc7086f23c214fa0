"""Models of other packages on the kernels of this one: a module for each engine, which alone needs that engine."""
