#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// The gradients of bidirectional linear attention, on the current device, with what linear/bidirectional_forward.h says of
// tensors, pieces and states. With g_i = dO_i inverse_i and w_i = -(dO_i . o_i) inverse_i, the pair of query i and key j has
// dA_ij = g_i . v_j + w_i; without `inverse` g is dO and w is 0.

// dq_i = phi'(q_i) sum_j dA_ij phi(k_j); partials (B, Hkv, num_pieces, D, D) and partial_norms (B, Hkv, num_pieces, D), float32
// and contiguous: sums of phi(q_i) g_i^T and of phi(q_i) w_i over each piece of all query heads of the group.
//
// states and norms: sums over the keys of each sequence, as in the forward. num_tokens: of queries.
struct LinearBidirectionalGradQueries {
    const void *q, *grad_o;
    const float *inverse, *states, *norms;
    void* dq;
    float *partials, *partial_norms;
    const int32_t* pieces;
    std::array<int64_t, 3> q_strides, grad_o_strides, dq_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states;

    NEARFAR_MEMBERS(q, grad_o, inverse, states, norms, dq, partials, partial_norms, pieces, q_strides, grad_o_strides,
                    dq_strides, batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states)
};

// dk_j = phi'(k_j) sum_i dA_ij phi(q_i) and dv_j = sum_i A_ij g_i, over all query heads of the group.
//
// states (B, Hkv, num_states, D, D) and norms (B, Hkv, num_states, D), float32 and contiguous: sums of phi(q_i) g_i^T and of
// phi(q_i) w_i over the queries of each sequence. num_tokens: of keys.
struct LinearBidirectionalGradKeys {
    const void *k, *v;
    const float *states, *norms;
    void *dk, *dv;
    const int32_t* pieces;
    std::array<int64_t, 3> k_strides, v_strides, dk_strides, dv_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states;

    NEARFAR_MEMBERS(k, v, states, norms, dk, dv, pieces, k_strides, v_strides, dk_strides, dv_strides, batches, heads, kv_heads,
                    num_tokens, width, num_pieces, piece_length, num_states)
};

// Shared memory that a block takes for a head width: the larger of the two.
int64_t linear_bidirectional_backward_shared_bytes(int64_t width);

void linear_bidirectional_grad_queries(const LinearBidirectionalGradQueries& call, const std::string& feature_map,
                                       cudaStream_t stream);
void linear_bidirectional_grad_keys(const LinearBidirectionalGradKeys& call, const std::string& feature_map,
                                    cudaStream_t stream);

}  // namespace nearfar
