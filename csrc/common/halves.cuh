// Two float16 numbers in one word, compared at once.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace nearfar {

constexpr uint32_t kHalfOnes = 0x3c003c00;    // 1.0 twice
constexpr uint32_t kHalfLowest = 0xfc00fc00;  // -infinity twice

// 1.0 for each half of `x` that exceeds that of `cut`, 0.0 for the others.
__device__ __forceinline__ uint32_t exceeds(uint32_t x, uint32_t cut) {
    const __half2 mask = __hgt2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(cut));
    return reinterpret_cast<const uint32_t&>(mask);
}

// The same, and 1.0 where one of the two is not a number.
__device__ __forceinline__ uint32_t exceeds_or_nan(uint32_t x, uint32_t cut) {
    const __half2 mask = __hgtu2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(cut));
    return reinterpret_cast<const uint32_t&>(mask);
}

// Sets `first` (`second`) to -infinity unless the lower (upper) half of `x` exceeds that of `cut` or is not a number.
__device__ __forceinline__ void keep_exceeding(float& first, float& second, uint32_t x, uint32_t cut) {
    asm("{\n\t"
        ".reg .pred p, q;\n\t"
        "setp.gtu.f16x2 p|q, %2, %3;\n\t"
        "selp.f32 %0, %0, 0fFF800000, p;\n\t"
        "selp.f32 %1, %1, 0fFF800000, q;\n\t"
        "}"
        : "+f"(first), "+f"(second)
        : "r"(x), "r"(cut));
}

}  // namespace nearfar
