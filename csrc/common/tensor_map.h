// How the tensor memory accelerator sees a (B, H, N, D) tensor of 16-bit numbers.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "check.h"

namespace nearfar {

// cuTensorMapEncodeTiled of the driver, which this module is not linked with.
inline auto tensor_map_encoder() {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        NEARFAR_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encode;
}

// Boxes of `rows` rows and 64 columns, as panels (hopper.cuh). sizes: B, H, N, D; strides in numbers, of the first three.
inline CUtensorMap tensor_map(const void* data, bool bfloat16, const std::array<int64_t, 4>& sizes,
                              const std::array<int64_t, 3>& strides, int rows) {
    const auto [batches, heads, num_rows, width] = sizes;
    const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    // A dimension of one has any stride.
    const auto bytes = [&](int i) { return static_cast<uint64_t>(sizes[i] == 1 ? 16 : 2 * strides[i]); };
    const std::array<uint64_t, 4> extents{size(width), size(num_rows), size(heads), size(batches)};
    const std::array<uint64_t, 3> steps{bytes(2), bytes(1), bytes(0)};
    const std::array<uint32_t, 4> box{64, static_cast<uint32_t>(rows), 1, 1}, every{1, 1, 1, 1};
    CUtensorMap map;
    const CUresult status = tensor_map_encoder()(
        &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(data),
        extents.data(), steps.data(), box.data(), every.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
    return map;
}

}  // namespace nearfar
