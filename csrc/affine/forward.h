#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

// Softmax attention and what affine-scaled attention makes of it, on the current device, a GPU of compute capability 9.0:
// u = softmax(scale q k^T) v, and o = alpha u + beta c, where c_i is the sum of the values that query i sees.
//
// q (B, Hq, N, D), k and v (B, Hkv, M, D), o (B, Hq, N, D): float16 or bfloat16, strides in numbers for the first three
// dimensions, 1 for the last; rows start at multiples of 16 bytes. D is 64 or 128, scale > 0. Query i sees the keys up to
// i + M - N + right, all of them if right < 0.
//
// alpha, beta (B, Hq, N) float32 or null, u (B, Hq, N, D) like o or null: without alpha and beta o is u. sink (Hq,) float32, a
// logit in the denominator alone, or null. lse (B, Hq, N) float32, in base 2, 0 where a query sees no key. sums (B, Hkv, M /
// kAffineChunk rounded up, D) float32, with beta: of the values of all chunks up to each. All of these are contiguous.
// counter: one int32, a workspace.
struct AffineForward {
    const void *q, *k, *v;
    const float *alpha, *beta, *sink, *sums;
    void *o, *u;
    float* lse;
    int32_t* counter;
    std::array<int64_t, 3> q_strides, k_strides, v_strides, o_strides;
    int64_t batches, heads, kv_heads, num_queries, num_keys, width, right;
    double scale;

    NEARFAR_MEMBERS(q, k, v, alpha, beta, sink, sums, o, u, lse, counter, q_strides, k_strides, v_strides, o_strides, batches,
                    heads, kv_heads, num_queries, num_keys, width, right, scale)
};

inline constexpr int kAffineChunk = 128;  // tokens

void affine_forward(const AffineForward& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
