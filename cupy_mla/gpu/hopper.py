"""What a Hopper GPU allows: the limits that the kernels are made for, each in one place."""

from __future__ import annotations

COMPUTE_CAPABILITY = (9, 0)
ARCH = "sm_90a"  # plain sm_90 refuses wgmma and setmaxnreg

COMMON_SMS = 132  # of an H100 SXM and of an H200, for what is worked out without a GPU
MAX_SMS = 160  # of a GPU, in the structs that have a bit for each SM; a full GH100 has 144
SM_REGISTERS = 65_536  # of 32 bits
REGISTER_UNIT = 8  # a thread's registers come in multiples of it
WARP_THREADS = 32
WARPGROUP_THREADS = 128

MAX_SHARED_BYTES = 232_448  # dynamic shared memory that a CTA can opt in to
FREE_SHARED_BYTES = 48 * 1024  # and that it may have without
CTA_SHARED_BYTES = 1024  # that every CTA takes besides its own
