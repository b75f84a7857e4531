#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// The gradients of hadamard_causal_forward, on the current device, with what that header says of tensors, pieces and states.
// With g_i = dO_i inverse_i and w_i = -(dO_i . o_i) inverse_i, the pair of query i and key j has dA_ij = g_i . v_j + w_i;
// without `inverse` g is dO and w is 0.

// dq^r_i = phi'(q^r_i) sum_{j <= i} dA_ij (phi(q^s_i) . phi(k^s_j)) phi(k^r_j), s the other factor, and weights, (B, Hq, N)
// float32, contiguous: w.
//
// states and norms: sums before each piece, and eps, as in the forward.
struct HadamardCausalGradQueries {
    const void *q1, *q2, *k1, *k2, *v, *grad_o;
    const float *inverse, *states, *norms;
    void *dq1, *dq2;
    float* weights;
    const int32_t* pieces;
    std::array<int64_t, 3> q1_strides, q2_strides, k1_strides, k2_strides, v_strides, grad_o_strides, dq1_strides, dq2_strides;
    int64_t batches, heads, kv_heads, num_tokens, num_pieces, piece_length;
    double eps;

    NEARFAR_MEMBERS(q1, q2, k1, k2, v, grad_o, inverse, states, norms, dq1, dq2, weights, pieces, q1_strides, q2_strides,
                    k1_strides, k2_strides, v_strides, grad_o_strides, dq1_strides, dq2_strides, batches, heads, kv_heads,
                    num_tokens, num_pieces, piece_length, eps)
};

// dk^r_j = phi'(k^r_j) sum_{i >= j} dA_ij (phi(q^s_i) . phi(k^s_j)) phi(q^r_i) and dv_j = sum_{i >= j} A_ij g_i, over all query
// heads of the group.
//
// states (B, Hkv, num_pieces, 16, 16, 64) and norms (B, Hkv, num_pieces, 16, 16): sums of f_i g_i^T and f_i w_i over the
// queries of the group after each piece; null for none.
struct HadamardCausalGradKeys {
    const void *k1, *k2, *v, *q1, *q2, *grad_o;
    const float *inverse, *weights, *states, *norms;
    void *dk1, *dk2, *dv;
    const int32_t* pieces;
    std::array<int64_t, 3> k1_strides, k2_strides, v_strides, q1_strides, q2_strides, grad_o_strides, dk1_strides, dk2_strides,
        dv_strides;
    int64_t batches, heads, kv_heads, num_tokens, num_pieces, piece_length;

    NEARFAR_MEMBERS(k1, k2, v, q1, q2, grad_o, inverse, weights, states, norms, dk1, dk2, dv, pieces, k1_strides, k2_strides,
                    v_strides, q1_strides, q2_strides, grad_o_strides, dk1_strides, dk2_strides, dv_strides, batches, heads,
                    kv_heads, num_tokens, num_pieces, piece_length)
};

// Shared memory that a block takes: the larger of the two.
int64_t hadamard_causal_backward_shared_bytes();

void hadamard_causal_grad_queries(const HadamardCausalGradQueries& call, const std::string& feature_map, cudaStream_t stream);
void hadamard_causal_grad_keys(const HadamardCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
