// Products of a block's rows with all tiles of the other side (keys for queries, or queries for keys), for kernels that keep
// little per pair.
//
// One thread copies the tiles into a pipeline. Warp groups, each with 64 of the block's rows, multiply them with one tile after
// the other at their own pace: while one group uses its products, those of other groups run. So tiles are read once for all
// groups.
#pragma once

#include <algorithm>
#include <cstdint>

#include "constants.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "pipeline.cuh"

namespace nearfar {

// Products of `kProducts` pairs of tensors per tile: rows x_i with tiles y_i, all `kWidth` wide.
template <typename Number_, int kWidth_, int kProducts_, int kGroups_, int kTile_, int kStages_>
struct PairTraits {
    using Number = Number_;
    static constexpr int kWidth = kWidth_, kProducts = kProducts_, kGroups = kGroups_, kStages = kStages_;
    static constexpr int kTile = kTile_;          // rows of a tile of the other side
    static constexpr int kRows = 64 * kGroups;    // of a block
    static constexpr int kThreads = 128 * (kGroups + 1);
    // Of a thread with rows and of one that copies: all of a multiprocessor's 65,536.
    static constexpr int kRegisters = kGroups == 3 ? 160 : 112, kProducerRegisters = 24;
    static constexpr int kPanels = kProducts * kWidth / 64;
    static constexpr int kOwnPanel = 128 * kRows, kPanel = 128 * kTile;
    static constexpr int kSlotBytes = kPanels * kPanel;
    static constexpr int kVectorBytes = 4 * kTile;
    // Bytes from the start of shared memory: the block's rows, slots, one number for each row of a slot, and barriers.
    static constexpr int kSlots = kPanels * kOwnPanel;
    static constexpr int kVectors = kSlots + kStages * kSlotBytes;
    static constexpr int kBarriers = kVectors + kStages * kVectorBytes;
    static constexpr int kBytes = kBarriers + Pipeline<kStages>::kBytes + 8;
    static_assert(kWidth % 64 == 0 && (kGroups == 3 || kGroups == 4));
    using Products = float[kProducts][kTile / 2];
};

// Which positions rows reach: row r those from r + offset - back to r + offset + ahead that there are.
struct Band {
    int offset, back, ahead, num_rows, num_others;

    __device__ int begin(int row) const { return max(0, min(row, num_rows - 1) + offset - back); }
    __device__ int end(int row) const { return min(num_others, min(row, num_rows - 1) + offset + ahead + 1); }
};

// Position of a block's rows, and the head of the other side.
struct Place {
    int tile, batch, head, other_head;
};

// A tile of rows from `row` on, panel by panel, `apart` bytes after each other; the barrier expects its bytes.
template <int Panels>
__device__ __forceinline__ void copy_panels(const CUtensorMap& tensor, uint32_t to, int apart, int row, int head, int batch,
                                            uint32_t barrier) {
#pragma unroll
    for (int i = 0; i < Panels; ++i) copy_box(to + i * apart, tensor, 64 * i, row, head, batch, barrier);
}

// The products c = x y^T of 64 rows x, whose panels are x_apart bytes after each other, and a tile of `Tile` rows y, as part of
// a group; add: c += them.
template <typename T, int Width, int Tile>
__device__ __forceinline__ void put_tile_product(float (&c)[Tile / 2], uint32_t x, int x_apart, uint32_t y, int y_apart,
                                                 bool add = false) {
#pragma unroll
    for (int i = 0; i < Width / 16; ++i)
        start_product<T, Tile>(c, panel_operand(x + i / 4 * x_apart, i % 4 * 32),
                               panel_operand(y + i / 4 * y_apart, i % 4 * 32), add || i > 0);
}

// The products sum += weights y, for fragments of weights of the rows y, likewise.
template <typename T, int Width, int Tile>
__device__ __forceinline__ void put_weighted_sum(float (&sum)[Width / 2], const uint32_t (&weights)[Tile / 16][4], uint32_t y,
                                                 int y_apart) {
#pragma unroll
    for (int i = 0; i < Tile / 16; ++i)
        start_product_of_rows<T, Width>(sum, weights[i], rows_operand(y + 16 * 128 * i, y_apart));
}

// Both as groups of their own, which are started.
template <typename T, int Width, int Tile>
__device__ __forceinline__ void start_tile_product(float (&c)[Tile / 2], uint32_t x, int x_apart, uint32_t y, int y_apart) {
    put_tile_product<T, Width, Tile>(c, x, x_apart, y, y_apart);
    commit_products();
}

template <typename T, int Width, int Tile>
__device__ __forceinline__ void start_weighted_sum(float (&sum)[Width / 2], const uint32_t (&weights)[Tile / 16][4], uint32_t y,
                                                   int y_apart) {
    put_weighted_sum<T, Width, Tile>(sum, weights, y, y_apart);
    commit_products();
}

// Element i of the products of a lane is of the first of its two rows, or of the second where i / 2 is odd, and of this column.
__device__ constexpr int product_column(int lane, int i) { return i / 4 * 8 + 2 * (lane % 4) + i % 2; }

// The first of the two rows of this thread, the other one is 8 further; beyond all rows in the warps that have none.
template <typename Traits>
__device__ int own_row(const Place& place) {
    return place.tile * Traits::kRows + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
}

// Calls body.add<Edges>(products, first, vector) for each tile that some row of the block reaches. The products are those with
// rows [first, first + kTile) of the other side, and the vector has one number for each of these. Without Edges all rows of the
// group reach all of them.
// vectors: one number for each row of the other side in global memory, padded to whole tiles, or null. Returns true to threads
// that have rows.
template <typename Traits, typename Arguments, typename Body>
__device__ __forceinline__ bool for_each_tile(const Arguments& arguments, const Place& place, const float* vectors,
                                              char* memory, Body& body) {
    constexpr int kTile = Traits::kTile, kGroups = Traits::kGroups, kStages = Traits::kStages;
    constexpr int kPanelsEach = Traits::kPanels / Traits::kProducts;
    const Band& band = arguments.band;
    const uint32_t base = shared_address(memory);
    const Pipeline<kStages> pipeline{base + Traits::kBarriers};
    const uint32_t loaded = pipeline.barriers + pipeline.kBytes;
    if (threadIdx.x == 0) {
        init_barrier(loaded, 1);
        pipeline.init(4 * kGroups);
        publish_barriers();
    }
    __syncthreads();

    const int group = __shfl_sync(kWholeWarp, threadIdx.x / 128, 0);
    const int first_row = place.tile * Traits::kRows;
    const int begin = band.begin(first_row) / kTile, end = (band.end(first_row + Traits::kRows - 1) + kTile - 1) / kTile;
    if (group == kGroups) {
        release_registers<Traits::kProducerRegisters>();
        if (threadIdx.x % 128 > 0) return false;
        arrive_expecting(loaded, Traits::kSlots);
#pragma unroll
        for (int i = 0; i < Traits::kPanels; ++i)
            copy_box(base + i * Traits::kOwnPanel, arguments.own[i / kPanelsEach], i % kPanelsEach * 64, first_row, place.head,
                     place.batch, loaded);
        for (int tile = begin; tile < end; ++tile) {
            const int step = tile - begin, slot = step % kStages;
            pipeline.wait_empty(step);
            arrive_expecting(pipeline.full(step), Traits::kSlotBytes + (vectors == nullptr ? 0 : Traits::kVectorBytes));
#pragma unroll
            for (int i = 0; i < Traits::kPanels; ++i)
                copy_box(base + Traits::kSlots + slot * Traits::kSlotBytes + i * Traits::kPanel,
                         arguments.others[i / kPanelsEach], i % kPanelsEach * 64, tile * kTile, place.other_head, place.batch,
                         pipeline.full(step));
            if (vectors != nullptr)
                copy_bytes(base + Traits::kVectors + slot * Traits::kVectorBytes, vectors + tile * kTile, Traits::kVectorBytes,
                           pipeline.full(step));
        }
        return false;
    }
    claim_registers<Traits::kRegisters>();

    const int top = first_row + 64 * group, bottom = top + 63;
    const int all_begin = band.begin(bottom), all_end = band.end(top);
    wait_for_barrier(loaded, 0);
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        const int step = tile - begin, slot = step % kStages, first = tile * kTile;
        const uint32_t rows = base + 64 * 128 * group, others = base + Traits::kSlots + slot * Traits::kSlotBytes;
        typename Traits::Products products;
        pipeline.wait_full(step);
        begin_products();
#pragma unroll
        for (int i = 0; i < 4 * Traits::kPanels; ++i)
            start_product<typename Traits::Number, kTile>(
                products[i / 4 / kPanelsEach], panel_operand(rows + i / 4 * Traits::kOwnPanel, i % 4 * 32),
                panel_operand(others + i / 4 * Traits::kPanel, i % 4 * 32), i % (4 * kPanelsEach) > 0);
        commit_products();
        wait_for_products<0>(products);
        const auto* const vector = reinterpret_cast<const float*>(memory + Traits::kVectors) + slot * kTile;
        if (first >= all_begin && first + kTile <= all_end) body.template add<false>(products, first, vector);
        else body.template add<true>(products, first, vector);
        pipeline.release(step);
    }
    return true;
}

}  // namespace nearfar
