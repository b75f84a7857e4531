// What a launch of a kernel of pairs.cuh takes, and how blocks find their rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "check.h"
#include "dtype.h"
#include "occupancy.h"
#include "pairs.cuh"
#include "tensor_map.h"

namespace nearfar {

// A (B, H, N, D) tensor of 16-bit numbers, as the host sees it; strides in numbers, of the first three dimensions.
struct Rows {
    const void* data;
    std::array<int64_t, 4> sizes;
    std::array<int64_t, 3> strides;

    template <typename Number>
    CUtensorMap map(int rows) const {
        return tensor_map(data, std::is_same_v<Number, __nv_bfloat16>, sizes, strides, rows);
    }
};

// Which keys queries see: limits below 0 are none.
struct Sight {
    int64_t num_queries, num_keys, left, right;

    Band of_queries() const {
        return {static_cast<int>(num_keys - num_queries), limit(left), limit(right), static_cast<int>(num_queries),
                static_cast<int>(num_keys)};
    }
    Band of_keys() const {
        return {static_cast<int>(num_queries - num_keys), limit(right), limit(left), static_cast<int>(num_keys),
                static_cast<int>(num_queries)};
    }

   private:
    static int limit(int64_t limit) {
        constexpr int64_t kUnlimited = 1 << 30;
        return static_cast<int>(limit < 0 ? kUnlimited : std::min(limit, kUnlimited));
    }
};

inline int64_t whole_tiles(int64_t rows, int tile) { return (rows + tile - 1) / tile * tile; }

// heads: of queries, in groups of `group` for each head of keys. Blocks have the tiles of rows of one head after the other.
template <int kProducts>
struct PairArguments {
    CUtensorMap own[kProducts], others[kProducts];
    Band band;
    int heads, group, tiles;

    // The last queries first: with causality they see most.
    __device__ Place of_queries(int block) const {
        const int head = block / tiles % heads;
        return {tiles - 1 - block % tiles, block / tiles / heads, head, head / group};
    }
    // The first keys first: with causality most see them.
    __device__ Place of_keys(int block) const {
        const int head = block / tiles % heads;
        return {block % tiles, block / tiles / heads, head / group, head};
    }
};

// own and others: for each product, the tensor of the block's rows and that of the other side.
template <typename Traits>
PairArguments<Traits::kProducts> pair_arguments(const std::array<Rows, Traits::kProducts>& own,
                                                const std::array<Rows, Traits::kProducts>& others, const Band& band,
                                                int64_t heads, int64_t kv_heads) {
    using Number = typename Traits::Number;
    PairArguments<Traits::kProducts> arguments{};
    for (int i = 0; i < Traits::kProducts; ++i) {
        arguments.own[i] = own[i].template map<Number>(Traits::kRows);
        arguments.others[i] = others[i].template map<Number>(Traits::kTile);
    }
    arguments.band = band;
    arguments.heads = static_cast<int>(heads), arguments.group = static_cast<int>(heads / kv_heads);
    arguments.tiles = static_cast<int>((own[0].sizes[2] + Traits::kRows - 1) / Traits::kRows);
    return arguments;
}

// Calls `body` with a null `Number*` and the width as an integral constant.
template <typename Body>
void dispatch_hopper(DType dtype, int64_t width, const Body& body) {
    dispatch_half_and_width(dtype, width, [&](auto* type, auto width) {
        if constexpr (width == 32) throw std::invalid_argument("width must be 64 or 128");
        else body(type, width);
    });
}

template <auto kKernel, typename Traits, typename Arguments>
void launch_pairs(Arguments& arguments, int64_t heads, cudaStream_t stream, const char* name) {
    resident_blocks<kKernel>(Traits::kThreads, Traits::kBytes);
    void* parameters[] = {&arguments};
    const auto blocks = static_cast<unsigned>(heads * arguments.pairs.tiles);
    check(cudaLaunchKernel(kKernel, dim3(blocks), dim3(Traits::kThreads), parameters, Traits::kBytes, stream), name);
}

}  // namespace nearfar
