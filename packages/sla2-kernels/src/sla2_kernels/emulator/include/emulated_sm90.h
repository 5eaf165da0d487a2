// The functions of csrc/sm90/ptx_sm90.cuh on the CPU.
#pragma once
#include "roles.h"
#include "wgmma.h"

#define SLA2_ALIGNED_SHARED(name) SLA2_DYNAMIC_SHARED(name)

inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
