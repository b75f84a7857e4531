#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"
#include "diagnostics/tile.h"

namespace nearfar {

// What softmax attention does with scores scale q.k, scale > 0, on the current device, a GPU of compute capability 9.0.
//
// q (B, Hq, N, D), k (B, Hkv, M, D): float16 or bfloat16, strides in numbers for the first three dimensions, 1 for the last;
// rows start at multiples of 16 bytes. D is 64 or 128. Query i sees the keys from i + M - N - left to i + M - N + right; left
// or right below 0 is without limit; every query sees one.
//
// lse, entropy, max_weight: (B, Hq, N) float32, max_key likewise int64; mass (B, Hq, M) float32; all contiguous. levels is a
// workspace of (B, Hq, N') float32, where N' is N as a multiple of kDiagnosticsTile.
struct Statistics {
    const void *q, *k;
    float *lse, *entropy, *max_weight;
    int64_t* max_key;
    float *mass, *levels;
    std::array<int64_t, 3> q_strides, k_strides;
    int64_t batches, heads, kv_heads, num_queries, num_keys, width, left, right;
    double scale;

    NEARFAR_MEMBERS(q, k, lse, entropy, max_weight, max_key, mass, levels, q_strides, k_strides, batches, heads, kv_heads,
                    num_queries, num_keys, width, left, right, scale)
};

void statistics(const Statistics& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
