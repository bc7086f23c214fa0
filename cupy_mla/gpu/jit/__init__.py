"""Run-time compilation: a kernel's source and defines to a loaded function on a GPU.

Four small steps, each its own file: ``source`` names what is compiled and digests it, ``compiler`` turns it into a
cubin with NVRTC and never touches the disk, ``cache`` keeps cubins on disk by digest, ``module`` loads them with CuPy.
"""
