#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// Causal Hadamard attention with two factors of 16 features, on the current device: o_i = sum_{j <= i} A_ij v_j, and where
// there is `inverse` times inverse_i = 1 / (sum_{j <= i} A_ij + eps), or 0 for 1 / 0, with A_ij the product of the two
// phi(q^r_i) . phi(k^r_j).
//
// q1, q2 (B, Hq, N, 16), k1, k2 (B, Hkv, N, 16), v (B, Hkv, N, 64), o (B, Hq, N, 64): as in linear/causal_forward.h, which says
// also what `inverse` and pieces are. states (B, Hkv, num_pieces, 16, 16, 64) and norms (B, Hkv, num_pieces, 16, 16), float32
// and contiguous: sums over the keys before each piece; null for none.
struct HadamardCausalForward {
    const void *q1, *q2, *k1, *k2, *v;
    const float *states, *norms;
    void* o;
    float* inverse;
    const int32_t* pieces;
    std::array<int64_t, 3> q1_strides, q2_strides, k1_strides, k2_strides, v_strides, o_strides;
    int64_t batches, heads, kv_heads, num_tokens, num_pieces, piece_length;
    double eps;

    NEARFAR_MEMBERS(q1, q2, k1, k2, v, states, norms, o, inverse, pieces, q1_strides, q2_strides, k1_strides, k2_strides,
                    v_strides, o_strides, batches, heads, kv_heads, num_tokens, num_pieces, piece_length, eps)
};

// Shared memory that a block takes.
int64_t hadamard_causal_forward_shared_bytes();

void hadamard_causal_forward(const HadamardCausalForward& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
