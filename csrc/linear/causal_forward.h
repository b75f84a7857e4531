#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// Causal linear attention with one factor, on the current device: o_i = sum_{j <= i} A_ij v_j, and where there is `inverse`
// times inverse_i = 1 / (sum_{j <= i} A_ij + eps), or 0 for 1 / 0, with A_ij = phi(q_i) . phi(k_j).
//
// q (B, Hq, N, D), k (B, Hkv, N, D), v (B, Hkv, N, D), o (B, Hq, N, D): bfloat16, strides in numbers for the first three
// dimensions, 1 for the last; every row starts at a multiple of 16 bytes. D is 64 or 128. inverse: (B, Hq, N) float32,
// contiguous, or null.
//
// One block walks through each piece of each head: `piece_length` tokens, the last piece fewer, or where there is `pieces`,
// (2 or more, num_pieces) int32, from its first to its second row; empty ones are skipped. states (B, Hkv, num_pieces, D, D)
// and norms (B, Hkv, num_pieces, D), float32 and contiguous: sums over the keys before each piece; null for none.
struct LinearCausalForward {
    const void *q, *k, *v;
    const float *states, *norms;
    void* o;
    float* inverse;
    const int32_t* pieces;
    std::array<int64_t, 3> q_strides, k_strides, v_strides, o_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length;
    double eps;

    NEARFAR_MEMBERS(q, k, v, states, norms, o, inverse, pieces, q_strides, k_strides, v_strides, o_strides, batches, heads,
                    kv_heads, num_tokens, width, num_pieces, piece_length, eps)
};

// Shared memory that a block takes for a head width.
int64_t linear_causal_forward_shared_bytes(int64_t width);

void linear_causal_forward(const LinearCausalForward& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
