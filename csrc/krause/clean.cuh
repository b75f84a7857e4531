// NaN of one packed sequence must not reach another: pairs that do not see each other have weight 0, and 0 times NaN is NaN. So
// values that are not finite are replaced by 0 in such products, and rows that do see them are set to NaN separately.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/mma.cuh"
#include "common/tile.cuh"

namespace nearfar {

// Two 16-bit numbers, those that are not finite replaced by 0.
template <typename T>
__device__ __forceinline__ uint32_t finite_or_zero(uint32_t word) {
    constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
    if ((word & kExponent) == kExponent) word &= 0xffff0000;
    if ((word >> 16 & kExponent) == kExponent) word &= 0xffff;
    return word;
}

// Cleans 16 rows of a tile by one warp. marks: null, or a number for each row, which becomes NaN where there was something to
// clean.
template <typename T, int Width>
__device__ __forceinline__ void clean_rows(uint4* rows, int lane, float* marks) {
    constexpr int kChunks = Tile<Width>::kChunks;
#pragma unroll 1
    for (int i = lane; i < 16 * kChunks; i += 32) {
        const uint4 chunk = rows[i];
        const uint4 clean = {finite_or_zero<T>(chunk.x), finite_or_zero<T>(chunk.y), finite_or_zero<T>(chunk.z),
                             finite_or_zero<T>(chunk.w)};
        const bool changed = clean.x != chunk.x || clean.y != chunk.y || clean.z != chunk.z || clean.w != chunk.w;
        if (changed) rows[i] = clean;
        const uint32_t of_row = __ballot_sync(kWholeWarp, changed) >> (lane & ~(kChunks - 1)) & ((1u << kChunks) - 1);
        if (marks != nullptr && i % kChunks == 0 && of_row) marks[i / kChunks] = NAN;
    }
}

}  // namespace nearfar
