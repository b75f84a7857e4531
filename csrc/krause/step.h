#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

constexpr int64_t kKrauseStepWindow = 1024;  // the most slots of a cache that the kernel serves

// One token of each sequence of Krause attention, on the current device.
//
// q (B, Hq, D), k (B, Hkv, D), v (B, Hkv, D), o (B, Hq, D): float16 or bfloat16, strides in numbers for the first two
// dimensions, 1 for the last. cached_k, cached_v (B, Hkv, W, D): contiguous. Every row starts at a multiple of 16 bytes; D is
// 32, 64 or 128. length: (B,) int32, how many tokens each sequence has had; it is not changed. sigma: float32, one number a
// query head `sigma_stride` apart.
//
// The token at position p = length[b] is written to slot p mod W of the cache. Its queries attend to the last min(p + 1, W)
// keys or, with top_k > 0, to the top_k best of them, of equal ones those at the smallest positions.
struct KrauseStep {
    const void *q, *k, *v;
    void *cached_k, *cached_v;
    const int32_t* length;
    const float* sigma;
    void* o;
    std::array<int64_t, 2> q_strides, k_strides, v_strides, o_strides;
    int64_t sigma_stride, batches, heads, kv_heads, window, width, top_k;

    NEARFAR_MEMBERS(q, k, v, cached_k, cached_v, length, sigma, o, q_strides, k_strides, v_strides, o_strides, sigma_stride,
                    batches, heads, kv_heads, window, width, top_k)
};

void krause_step(const KrauseStep& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
