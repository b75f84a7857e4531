// What the two walks of krause/backward.cu share: arguments, shared memory, and what the rows of a warp reach.
#pragma once

#include <cfloat>
#include <climits>
#include <cstdint>

#include "common/fragments.cuh"
#include "common/tensor.cuh"
#include "common/tile.cuh"
#include "krause/backward.h"
#include "krause/clean.cuh"
#include "krause/forward.h"
#include "krause/window.cuh"

namespace nearfar {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;                          // of a warp, and of a block of the ring
constexpr int kTileRows = kWarps * kRows;
static_assert(kTileRows == kKrauseTile);
constexpr int kTileBlocks = kTileRows / kRows;
constexpr int kRingTiles = (kTileRows + kKrauseWindow - 2) / kTileRows + 1;  // that a tile reaches at most
constexpr int kRingRows = kRingTiles * kTileRows;
constexpr int kStripTiles = 6;  // of 6, 11, 16, 22 and 43 the fastest (docs/notes/krause.md)

template <typename T>
struct Arguments {
    Tensor<const T> q, k, v, o, grad_o;
    Tensor<T> dq, dk, dv;
    const float *sigma, *lse;
    const int32_t* bits;
    float* partials;  // of the gradient of log(scale), (B, Hq, num_strips)
    int64_t sigma_stride;
    Window window, seen_by;  // of a query, and of a key: the queries that see it
    int heads, group, query_tiles, key_tiles;
    int num_strips;  // of a query head; of a key head for each of its query heads
    int num_words;   // of a row's bits
    int num_blocks;  // of the ring that a warp may reach, or more
};

// A block's shared memory: a ring of rows of two matrices, with two numbers per row, and three tiles of its own rows.
template <int Width>
struct Memory {
    static constexpr int kRowBytes = Tile<Width>::kRowBytes;
    static constexpr int kTileBytes = kTileRows * kRowBytes;
    static constexpr int kSecond = kRingRows * kRowBytes;  // from a row of the first matrix to that of the second
    static constexpr int kNumbers = (2 * kRingTiles + 3) * kTileBytes;
    static constexpr int kBytes = kNumbers + kRingRows * 3 * static_cast<int>(sizeof(float));

    uint4* rows;  // where the ring begins, whose shared address is `ring`
    uint32_t ring, own;
    float4* pairs;   // a number for each row, as it enters fragments c: those of rows 2 i and 2 i + 1, twice
    float* numbers;  // another one

    __device__ explicit Memory(uint4* memory)
        : rows(memory), ring(shared_address(memory)), own(ring + 2 * kRingTiles * kTileBytes),
          pairs(reinterpret_cast<float4*>(memory + kNumbers / 16)), numbers(reinterpret_cast<float*>(pairs + kRingRows / 2)) {}

    // Stores x for ring row `row` + quad and y for the one 8 further.
    __device__ void store_pairs(int row, int lane, float x, float y) const {
        const int quad = lane / 4, pair = lane % 4;
        float* const at = reinterpret_cast<float*>(pairs + (row + quad + 8 * pair) / 2) + quad % 2;
        if (pair < 2) at[0] = at[2] = pair == 0 ? x : y;
    }

    // Rids 16 rows of the ring, `offset` bytes from its start, of what is not finite; the warp has read them.
    template <typename T>
    __device__ void clean(uint32_t offset, int lane) const {
        __syncwarp();
        clean_rows<T, Width>(rows + offset / sizeof(uint4), lane, nullptr);
    }
};

__device__ __forceinline__ int wrap(int ring_row) { return ring_row < kRingRows ? ring_row : ring_row - kRingRows; }

// What the 16 rows of a warp reach, as columns: targets from the first that a whole window of the first row has.
struct WarpReach {
    int begin[2], end[2];         // of rows quad and quad + 8
    int first_block, stop_block;  // blocks of 16 columns that some row reaches
    int whole_stop;               // blocks from 1 on, and before this one, that every row reaches entirely

    __device__ WarpReach(const Window& window, int first_row, int lane) {
        const int first_column = first_row + window.offset - window.back;
        int low = INT_MAX, high = 0;
        bool whole = true;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = lane / 4 + 8 * r;
            const Reach row_reach = reach(window, first_row + row);
            const int count = row_reach.count();
            begin[r] = row_reach.begin - first_column;
            end[r] = begin[r] + count;
            whole = whole && begin[r] == row && count == window.size();
            if (count > 0) low = min(low, begin[r]), high = max(high, end[r]);
        }
        first_block = __reduce_min_sync(kWholeWarp, low) / kRows;
        stop_block = (__reduce_max_sync(kWholeWarp, high) + kRows - 1) / kRows;
        whole_stop = __all_sync(kWholeWarp, whole) ? window.size() / kRows : 0;
    }
    __device__ bool reaches(int block) const { return block >= first_block && block < stop_block; }
    __device__ bool entirely(int block) const { return block > 0 && block < whole_stop; }
    // A bit for each column of a block: those that row quad + 8 r reaches.
    __device__ uint32_t columns(int r, int block) const {
        return bits_from(begin[r] - kRows * block) & ~bits_from(end[r] - kRows * block);
    }
    __device__ static uint32_t bits_from(int bit) { return bit < 32 ? ~0u << max(bit, 0) : 0; }
};

// 1 / sigma^2. One that is not positive poisons its head; none is 0, because the sums of a group change their unit.
__device__ __forceinline__ float rbf_scale(float sigma) { return sigma > 0 ? fmaxf(1.0f / (sigma * sigma), FLT_MIN) : NAN; }

// Sets the weights of row quad + 8 r to 0 in the columns of a block whose bit is not set.
__device__ __forceinline__ void keep_columns(float (&weight)[2][4], int r, uint32_t bits, int pair) {
    const uint32_t mine = bits >> 2 * pair;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (!(mine >> (i / 2 * 8 + i % 2) & 1)) weight[i / 2][2 * r + i % 2] = 0;
}

// Subtracts total * x from two columns of row quad + 8 r, whose numbers of a tile of 8 columns are c.
template <typename T>
__device__ __forceinline__ void subtract(float (&c)[4], int r, float total, uint32_t x) {
    const float2 number = unpack<T>(x);
    c[2 * r] -= total * number.x;
    c[2 * r + 1] -= total * number.y;
}

// The weights of a block of 16 columns from `column` on, as integers in their order, with the column in the lowest bits: the
// largest of row quad + 8 r.
constexpr int kColumnBits = 8;
static_assert(kKrauseWindow + kRows <= 1 << kColumnBits);
constexpr int kColumns = (1 << kColumnBits) - 1;

__device__ __forceinline__ int heaviest(const float (&weight)[2][4], int r, int column, int pair) {
    int largest = kColumns;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        largest = max(largest, (__float_as_int(weight[i / 2][2 * r + i % 2]) & ~kColumns) |
                                   (column + 2 * pair) | (8 * (i / 2) + i % 2));
    return largest;
}

}  // namespace
}  // namespace nearfar
