#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/dtype.h"

namespace nearfar {

// out[b, h, n] = sum over d of x[b, h, n, d]^2, accumulated in float32, on the current device.
//
// x has sizes (B, H, N, D), strides in elements for b, h and n, and stride 1 for d. out is contiguous (B, H, N).
void row_sumsq(const void* x, float* out, DType dtype, const std::array<int64_t, 4>& sizes,
               const std::array<int64_t, 3>& strides, cudaStream_t stream);

}  // namespace nearfar
