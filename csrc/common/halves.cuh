// Two float16 numbers in one word, compared together.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace nearfar {

constexpr uint32_t kHalfOnes = 0x3c003c00;    // 1.0 twice
constexpr uint32_t kHalfLowest = 0xfc00fc00;  // -infinity twice

__device__ __forceinline__ uint32_t word_of(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }
__device__ __forceinline__ __half2 halves_of(uint32_t x) { return reinterpret_cast<const __half2&>(x); }

// 1.0 for each half of `x` that exceeds that of `cut`, 0.0 for the others.
__device__ __forceinline__ uint32_t exceeds(uint32_t x, uint32_t cut) { return word_of(__hgt2(halves_of(x), halves_of(cut))); }

// The same, and 1.0 where one of the two is not a number.
__device__ __forceinline__ uint32_t exceeds_or_nan(uint32_t x, uint32_t cut) {
    return word_of(__hgtu2(halves_of(x), halves_of(cut)));
}

// For each half all bits set where the comparison holds.
__device__ __forceinline__ uint32_t where_greater(uint32_t x, uint32_t y) { return __hgt2_mask(halves_of(x), halves_of(y)); }
__device__ __forceinline__ uint32_t where_less(uint32_t x, uint32_t y) { return __hlt2_mask(halves_of(x), halves_of(y)); }

// The bits of `x` where those of `mask` are set, of `y` where they are not.
__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t x, uint32_t y) { return (mask & x) | (~mask & y); }

// The number half-way, rounded: one of the two when they are neighbours.
__device__ __forceinline__ uint32_t half_way(uint32_t x, uint32_t y) {
    const __half2 half = __float2half2_rn(0.5f);
    return word_of(__hfma2(halves_of(x), half, __hmul2(halves_of(y), half)));
}

// The lower (upper) half twice.
__device__ __forceinline__ uint32_t lower_twice(uint32_t x) { return __byte_perm(x, 0, 0x1010); }
__device__ __forceinline__ uint32_t upper_twice(uint32_t x) { return __byte_perm(x, 0, 0x3232); }

}  // namespace nearfar
