#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

// The widest window of the kernels: more keys than these do not fit the registers that hold a query's scores.
constexpr int64_t kKrauseWindow = 128;

// Krause attention over a window, on the current device.
//
// q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, D), o (B, Hq, N, D): float16 or bfloat16, strides in numbers for the first
// three dimensions, 1 for the last; every row starts at a multiple of 16 bytes. D is 32, 64 or 128. sigma: float32, one
// number a query head `sigma_stride` apart. lse: (B, Hq, N) float32, contiguous, to base 2. token_bounds: (2, N) int32, or
// null. Query i reaches the keys from i + M - N - back to i + M - N + ahead, at most kKrauseWindow.
//
// top_k = 0: all of them. Otherwise the selection is written to bits, (B, Hq, N, words) int32, contiguous: key j is bit j
// modulo 32 * words, with 2 words for a window of up to 64 keys and 4 for wider ones.
struct KrauseForward {
    const void *q, *k, *v;
    const float* sigma;
    const int32_t* token_bounds;
    void* o;
    float* lse;
    int32_t* bits;
    std::array<int64_t, 3> q_strides, k_strides, v_strides, o_strides;
    int64_t sigma_stride, batches, heads, kv_heads, num_queries, num_keys, width, back, ahead, top_k;

    NEARFAR_MEMBERS(q, k, v, sigma, token_bounds, o, lse, bits, q_strides, k_strides, v_strides, o_strides, sigma_stride,
                    batches, heads, kv_heads, num_queries, num_keys, width, back, ahead, top_k)
};

// Shared memory that a block takes for a head width and a window: more than some devices of compute capability 8 have.
int64_t krause_forward_shared_bytes(int64_t width, int64_t window);

void krause_forward(const KrauseForward& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
