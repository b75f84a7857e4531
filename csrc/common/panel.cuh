// Operands of the products of hopper.cuh in shared memory.
//
// An operand is made of panels: `rows` rows of 64 numbers, 128 bytes each, permuted as Tile<64> says, from a multiple of 1,024
// bytes on. A tile of 128 columns is two panels.
#pragma once

#include <cstdint>

namespace nearfar {

// A panel as an operand of a product: 16 columns of it, from byte `offset` of its rows on.
__device__ __forceinline__ uint64_t panel_operand(uint32_t panel, int offset) {
    constexpr uint64_t kEightRows = 1024 >> 4, kPermuted = 1;  // bytes from eight rows to the next; 128 bytes are permuted
    return kPermuted << 62 | kEightRows << 32 | uint64_t{1} << 16 | (panel + offset) >> 4;
}

// 16 rows of a tile as the right operand of a product whose inner dimension they are: `panel` is the first of its panels at the
// first of these rows, a multiple of 16, the others follow `stride` bytes after each other.
__device__ __forceinline__ uint64_t rows_operand(uint32_t panel, uint32_t stride) {
    constexpr uint64_t kEightRows = 1024 >> 4, kPermuted = 1;
    return kPermuted << 62 | kEightRows << 32 | static_cast<uint64_t>(stride >> 4) << 16 | panel >> 4;
}

// An operand that starts this many bytes, a multiple of 16, further on: one addition.
__device__ __forceinline__ uint64_t further(uint64_t operand, int bytes) {
    return (operand >> 32) << 32 | (static_cast<uint32_t>(operand) + bytes / 16);
}

}  // namespace nearfar
