// What every softmax here agrees on.
#pragma once
#include "core/types.h"

namespace mla {

constexpr f32 kLog2e = 1.4426950408889634f;
constexpr f32 kLn2 = 0.6931471805599453f;

// The running maximum moves only when a score exceeds it by more than this (log2 units): P stays below 2^8.
constexpr f32 kRescaleThreshold = 8.0f;

MLA_DEVICE f32 minus_infinity() { return __int_as_float(0xff800000); }

}  // namespace mla
