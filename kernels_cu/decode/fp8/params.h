// The by-value parameters of the kernel for e4m3 caches: those of every decode kernel, and the scales of the cache.
// cupy_mla/kernels/structs.py mirrors Fp8Params; a test compares the two.
#pragma once
#include "decode/params.h"

namespace mla {

// A value of the cache is its e4m3 value times the scale of its part: the number at the address, or else the one given.
struct Fp8Params : DecodeParams {
    const f32* latent_scale_at;
    const f32* rope_scale_at;
    f32 latent_scale_value;
    f32 rope_scale_value;

    MLA_DEVICE f32 latent_scale() const { return latent_scale_at ? *latent_scale_at : latent_scale_value; }
    MLA_DEVICE f32 rope_scale() const { return rope_scale_at ? *rope_scale_at : rope_scale_value; }
    MLA_DEVICE f32 rope_ratio() const { return rope_scale() / latent_scale(); }
};

}  // namespace mla
