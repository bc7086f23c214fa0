"""From lengths to work: how a batch is split over the GPU. Pure NumPy."""
