// Tiles of rows of `Width` 16-bit numbers in shared memory, free of bank conflicts, and the fragments of mma.cuh in them.
//
// A row is made of chunks of 16 bytes. They are permuted within a row such that any eight consecutive rows hold the same
// column in different banks. The permutation depends on the row modulo 8 alone: a tile may start, and a ring of rows may
// wrap, at any multiple of 8, and a lane that steps by multiples of 8 rows keeps its offset within the row.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace nearfar {

template <int Width>
struct Tile {
    static_assert(Width == 32 || Width == 64 || Width == 128, "the widths that the permutation was made for");
    static constexpr int kChunks = Width / 8;
    static constexpr int kRowBytes = Width * 2;

    // Bytes from the start of a row to one of its chunks.
    __device__ static constexpr uint32_t column(int row, int chunk) {
        return static_cast<uint32_t>(chunk ^ (kChunks >= 8 ? row & 7 : row / 2 & (kChunks - 1))) * 16;
    }
    __device__ static constexpr uint32_t offset(int row, int chunk) {
        return static_cast<uint32_t>(row) * kRowBytes + column(row, chunk);
    }
};

// The rows and chunks that lane `lane` names to load_matrices for 16 x 16 numbers, relative to their first row and chunk.
//
// Normal: words 0 to 3 are rows 0-7 left, rows 8-15 left, rows 0-7 right, rows 8-15 right. So a load gives an a fragment;
// transposed, with rows as the inner dimension, b0 and b1 of the left columns and then of the right ones.
// Across: left and right of rows 0-7, then of rows 8-15: with rows as columns of b, b0 and b1 of the first 8 and of the
// last 8; transposed, with rows as the inner dimension of a, its four words.
struct LaneNormal {
    __device__ static int row(int lane) { return lane % 16; }
    __device__ static int chunk(int lane) { return lane / 16; }
};

struct LaneAcross {
    __device__ static int row(int lane) { return lane % 8 + lane / 16 * 8; }
    __device__ static int chunk(int lane) { return lane / 8 % 2; }
};

// Starts copying rows [first, first + Rows) of a matrix, whose rows are `stride` numbers apart, into a tile's rows from `to`
// on; rows outside [0, num_rows) become zero. Neighbouring ones of `Threads` threads copy neighbouring chunks of a row, and
// thread `thread` has chunk thread % kChunks of rows thread / kChunks, and so on in steps of Threads / kChunks rows.
template <int Width, int Rows, int Threads, typename T>
__device__ __forceinline__ void copy_rows(uint32_t to, const T* matrix, int64_t stride, int first, int num_rows, int thread) {
    using Tile = Tile<Width>;
    constexpr int kRowsAtOnce = Threads / Tile::kChunks;
    static_assert(Rows % kRowsAtOnce == 0 && kRowsAtOnce % 2 == 0, "every thread copies the same number of chunks");
    const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const T* source = matrix + static_cast<int64_t>(first + row) * stride + chunk * 8;
#pragma unroll
    for (int pass = 0; pass < Rows / kRowsAtOnce; ++pass, source += kRowsAtOnce * stride) {
        const int ahead = pass * kRowsAtOnce;
        const bool inside = static_cast<unsigned>(first + row + ahead) < static_cast<unsigned>(num_rows);
        copy_async(to + Tile::offset(row + ahead, chunk), source, inside);
    }
}

}  // namespace nearfar
