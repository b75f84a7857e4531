#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"
#include "diagnostics/tile.h"

namespace nearfar {

// The kernels of nearfar.selection_geometry that see pairs, on the current device, a GPU of compute capability 9.0. Scores are
// scale q.k, scale > 0. Tensors are those of diagnostics/statistics.h, and v (B, Hkv, M, D) is like k.
struct Geometry {
    const void *q, *k, *v;
    std::array<int64_t, 3> q_strides, k_strides, v_strides;
    int64_t batches, heads, kv_heads, num_queries, num_keys, width, left, right, top_n;
    double scale;
    float* scores;    // (B, Hq, N, top_n), q.k of the selected keys, the largest first, -inf where there are fewer
    int32_t* chosen;  // likewise, the keys; of equal scores the first ranks first
    // For `separate` alone, all contiguous:
    const void* s;          // (B, Hq, N, D), the weighted mean of the selected values, in the dtype of v
    const float* shift;     // (B, Hq, N): weights are 2^(score - shift), scores in base 2
    const float* farthest;  // likewise, the largest excess of a selected key
    const float* excess;    // like scores: of weight w, w (w |v|^2 / 2 - v.s), by which distances to s rank
    const float* squares;   // (B, Hkv, M'): |v|^2; M' is M as a multiple of kDiagnosticsTile
    float *precision, *recall, *f_score;  // (B, Hq, N)

    NEARFAR_MEMBERS(q, k, v, q_strides, k_strides, v_strides, batches, heads, kv_heads, num_queries, num_keys, width, left,
                    right, top_n, scale, scores, chosen, s, shift, farthest, excess, squares, precision, recall, f_score)
};

// Fills scores and chosen.
void geometry_select(const Geometry& call, DType dtype, cudaStream_t stream);

// Fills precision, recall and f_score.
void geometry_separate(const Geometry& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
