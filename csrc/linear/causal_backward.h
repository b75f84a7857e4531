#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// The gradients of linear_causal_forward, on the current device, with what that header says of tensors, pieces and states. With
// g_i = dO_i inverse_i and w_i = -(dO_i . o_i) inverse_i, the pair of query i and key j has dA_ij = g_i . v_j + w_i;
// without `inverse` g is dO and w is 0.

// dq_i = phi'(q_i) sum_{j <= i} dA_ij phi(k_j), and weights, (B, Hq, N) float32, contiguous: w.
//
// states and norms: sums before each piece, and eps, as in the forward.
struct LinearCausalGradQueries {
    const void *q, *k, *v, *grad_o;
    const float *inverse, *states, *norms;
    void* dq;
    float* weights;
    const int32_t* pieces;
    std::array<int64_t, 3> q_strides, k_strides, v_strides, grad_o_strides, dq_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length;
    double eps;

    NEARFAR_MEMBERS(q, k, v, grad_o, inverse, states, norms, dq, weights, pieces, q_strides, k_strides, v_strides,
                    grad_o_strides, dq_strides, batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, eps)
};

// dk_j = phi'(k_j) sum_{i >= j} dA_ij phi(q_i) and dv_j = sum_{i >= j} A_ij g_i, over all query heads of the group.
//
// states (B, Hkv, num_pieces, D, D) and norms (B, Hkv, num_pieces, D): sums of phi(q_i) g_i^T and phi(q_i) w_i over the queries
// of the group after each piece; null for none.
struct LinearCausalGradKeys {
    const void *k, *v, *q, *grad_o;
    const float *inverse, *weights, *states, *norms;
    void *dk, *dv;
    const int32_t* pieces;
    std::array<int64_t, 3> k_strides, v_strides, q_strides, grad_o_strides, dk_strides, dv_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length;

    NEARFAR_MEMBERS(k, v, q, grad_o, inverse, weights, states, norms, dk, dv, pieces, k_strides, v_strides, q_strides,
                    grad_o_strides, dk_strides, dv_strides, batches, heads, kv_heads, num_tokens, width, num_pieces,
                    piece_length)
};

// Shared memory that a block takes for a head width: the larger of the two.
int64_t linear_causal_backward_shared_bytes(int64_t width);

void linear_causal_grad_queries(const LinearCausalGradQueries& call, const std::string& feature_map, cudaStream_t stream);
void linear_causal_grad_keys(const LinearCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream);
// The same for heads 64 wide, on GPUs of compute capability 9.0 alone.
void linear_causal_grad_queries_hopper(const LinearCausalGradQueries& call, const std::string& feature_map,
                                       cudaStream_t stream);
void linear_causal_grad_keys_hopper(const LinearCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
