#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

// Gradients of affine_forward, on the current device, a GPU of compute capability 9.0.
//
// q, k, v, alpha, beta, sums and lse as for it, grad_o (B, Hq, N, D), and u, which is o where there is no epilogue. Rows of all
// of them start at multiples of 16 bytes. exact: the gradient of alpha or of a sink is wanted. Fills dq, dk and dv, m (B, Hq, N), the
// products of the rows of u and grad_o, which are the gradient of alpha, without what u lost by rounding if exact or with alpha
// or beta, and with beta dbeta (B, Hq, N). Workspaces are counters (2,) int32 and terms (4, B,
// Hq, N rounded up to a multiple of kAffineTerms) float32, from a multiple of 16 bytes on. m, dbeta and terms are contiguous.
struct AffineBackward {
    const void *q, *k, *v, *u, *grad_o;
    const float *alpha, *beta, *sums, *lse;
    void *dq, *dk, *dv;
    float *m, *dbeta, *terms;
    int32_t* counters;
    std::array<int64_t, 3> q_strides, k_strides, v_strides, u_strides, grad_o_strides, dq_strides, dk_strides, dv_strides;
    int64_t batches, heads, kv_heads, num_queries, num_keys, width, right, exact;
    double scale;

    NEARFAR_MEMBERS(q, k, v, u, grad_o, alpha, beta, sums, lse, dq, dk, dv, m, dbeta, terms, counters, q_strides, k_strides,
                    v_strides, u_strides, grad_o_strides, dq_strides, dk_strides, dv_strides, batches, heads, kv_heads,
                    num_queries, num_keys, width, right, exact, scale)
};

inline constexpr int kAffineTerms = 128;  // queries

void affine_backward(const AffineBackward& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
