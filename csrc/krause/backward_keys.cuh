// The walk of krause/backward.cu for the gradients of keys and values.
#pragma once

#include <cstdint>

#include "common/constants.cuh"
#include "common/fragments.cuh"
#include "krause/backward_walk.cuh"

namespace nearfar {
namespace {

// dk and dv over one strip of keys. Scores are transposed, keys by queries, so that the weights feed the next product.
template <typename T, int Width>
__device__ void grad_keys(const Arguments<T>& arguments, const Memory<Width>& memory, int outer, int strip, int num_strips) {
    constexpr int kRowBytes = Tile<Width>::kRowBytes, kTileBytes = Memory<Width>::kTileBytes, kSecond = Memory<Width>::kSecond;
    const Window& window = arguments.seen_by;  // its queries are keys, and its keys queries
    const int num_keys = window.num_queries, num_queries = window.num_keys;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, pair = lane % 4;
    const LaneOffsets<Width> offsets(lane);
    const int group = arguments.group, kv_heads = arguments.heads / group;
    const int kv_head = outer % kv_heads, batch = outer / kv_heads;
    const T* const k = arguments.k.at(batch, kv_head);
    const T* const v = arguments.v.at(batch, kv_head);
    const int num_words = arguments.num_words;
    const bool selected = arguments.bits != nullptr, packed = window.token_bounds != nullptr;
    const uint32_t ones = pack<T>(1.0f, 1.0f);

    const uint32_t my_rows = warp * kRows * kRowBytes;
    const auto fetch_keys = [&](int tile) {
        const int first = tile * kTileRows + warp * kRows;
        copy_rows<Width, kRows, 32>(memory.own + my_rows, k, arguments.k.row, first, num_keys, lane);
        copy_rows<Width, kRows, 32>(memory.own + kTileBytes + my_rows, v, arguments.v.row, first, num_keys, lane);
    };
    // Of the queries that key tile `tile` is the first to reach, this warp's: they, their dO, and o, of which delta remains.
    const auto first_query = [&](int tile) { return tile * kTileRows + window.offset - window.back + warp * kRows; };
    const auto fetch_queries = [&](int tile, int ring_row, int head, uint32_t o_rows) {
        const int first = first_query(tile);
        const uint32_t offset = ring_row * kRowBytes + my_rows;
        const auto fetch = [&](uint32_t to, const Tensor<const T>& rows) {
            copy_rows<Width, kRows, 32>(to, rows.at(batch, head), rows.row, first, num_queries, lane);
        };
        fetch(memory.ring + offset, arguments.q);
        fetch(memory.ring + kSecond + offset, arguments.grad_o);
        fetch(o_rows + my_rows, arguments.o);
    };
    const auto row_offset = [&](int head) { return (static_cast<int64_t>(batch) * arguments.heads + head) * num_queries; };
    const auto fetch_lse = [&](int tile, int head) {  // in lane i, of query i
        const int query = first_query(tile) + lane;
        const bool inside = lane < kRows && static_cast<unsigned>(query) < static_cast<unsigned>(num_queries);
        return inside ? arguments.lse[row_offset(head) + query] : 0.0f;
    };
    const auto store_lse = [&](int ring_row, float lse) {
        if (lane < kRows) memory.numbers[ring_row + warp * kRows + lane] = lse;
    };
    const auto store_delta = [&](int ring_row, uint32_t o_rows) {  // of the queries that have arrived
        uint32_t grad[Width / 16][4], out[Width / 16][4];
        load_rows<Width>(grad, memory.ring + kSecond + ring_row * kRowBytes + my_rows, offsets);
        load_rows<Width>(out, o_rows + my_rows, offsets);
        const float2 delta = row_products<T>(grad, out, lane);
        memory.store_pairs(ring_row + warp * kRows, lane, -delta.x, -delta.y);
        if (!packed) return;
        memory.template clean<T>(ring_row * kRowBytes + my_rows, lane);  // lse marks rows that were not finite
        memory.template clean<T>(kSecond + ring_row * kRowBytes + my_rows, lane);
        float* const lse = memory.numbers + ring_row + warp * kRows + quad;
        if (pair == 0) lse[0] += delta.x - delta.x, lse[8] += delta.y - delta.y;  // and so it does of dO
    };

    const int64_t tiles = arguments.key_tiles;
    const int first_tile = static_cast<int>(tiles * strip / num_strips);
    const int end_tile = static_cast<int>(tiles * (strip + 1) / num_strips);
    float next_lse = 0;
    int ring_row = 0;  // of the first query that sees the tile
    if (first_tile < end_tile) fetch_keys(first_tile);
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile, ring_row = wrap(ring_row + kTileRows)) {
        const bool more = tile + 1 < end_tile;
        const int first_row = tile * kTileRows + warp * kRows;
        const WarpReach mine(window, first_row, lane);
        wait_for_copies();
        __syncwarp();
        uint32_t key[Width / 16][4], value[Width / 16][4];
        load_rows<Width>(key, memory.own + my_rows, offsets);
        load_rows<Width>(value, memory.own + kTileBytes + my_rows, offsets);
        const float2 square = row_products<T>(key, key, lane);
        const float half_square[4] = {-0.5f * square.x, -0.5f * square.x, -0.5f * square.y, -0.5f * square.y};

        float dk[Width / 8][4] = {}, dv[Width / 8][4] = {};
        float ds_total[4] = {};  // of each row, in every column: the sum of what enters dk, with its rounding
        float unit = 1;  // of dk and ds_total: the scale of the head at hand
#pragma unroll 1
        for (int member = 0; member < group; ++member) {
            const int head = kv_head * group + member;
            const float scale = rbf_scale(arguments.sigma[head * arguments.sigma_stride]), scale2 = scale * kLog2E;
            if (member > 0) {
#pragma unroll
                for (int i = 0; i < Width / 2; ++i) dk[i / 4][i % 4] *= unit / scale;
                for (float& total : ds_total) total *= unit / scale;
            }
            unit = scale;
            // The ring goes on from tile to tile, unless heads take turns in it.
            if (group == 1 && tile > first_tile) {
                const int newest = wrap(ring_row + (kRingTiles - 1) * kTileRows);
                store_lse(newest, next_lse);
                store_delta(newest, memory.own + 2 * kTileBytes);
            } else {
                __syncthreads();  // every warp is done with the ring
#pragma unroll 1
                for (int t = 0; t < kRingTiles; ++t) {
                    fetch_queries(tile + t, wrap(ring_row + t * kTileRows), head, memory.own + t * kTileBytes);
                    store_lse(wrap(ring_row + t * kTileRows), fetch_lse(tile + t, head));
                }
                wait_for_copies();
                __syncwarp();
#pragma unroll 1
                for (int t = 0; t < kRingTiles; ++t)
                    store_delta(wrap(ring_row + t * kTileRows), memory.own + t * kTileBytes);
            }
            __syncthreads();
            if (more && member == group - 1) fetch_keys(tile + 1);

            // 16 bits of each query's selection are those of this warp's keys; lane i has those of query i of the next block.
            int query = first_row + window.offset - window.back + lane;
            const uint16_t* pieces =
                reinterpret_cast<const uint16_t*>(arguments.bits + (row_offset(head) + query) * num_words) +
                ((first_row / kRows) & (2 * num_words - 1));
            const auto fetch_piece = [&]() -> uint32_t {
                const bool inside = lane < kRows && static_cast<unsigned>(query) < static_cast<unsigned>(num_queries);
                const uint32_t piece = inside ? *pieces : 0;
                query += kRows;
                pieces += kRows * 2 * num_words;
                return piece;
            };
            uint32_t next_piece = selected ? fetch_piece() : 0;
#pragma unroll 1
            for (int block = 0; block < arguments.num_blocks; ++block) {
                if (block == kTileBlocks && more && group == 1) {  // No warp needs the oldest queries any more.
                    __syncthreads();
                    fetch_queries(tile + kRingTiles, ring_row, head, memory.own + 2 * kTileBytes);
                    next_lse = fetch_lse(tile + kRingTiles, head);
                }
                const uint32_t piece = next_piece;
                if (selected) next_piece = fetch_piece();
                if (!mine.reaches(block)) continue;
                const int row = wrap(ring_row + (warp + block) * kRows);
                const uint32_t queries = memory.ring + row * kRowBytes;
                float weight[2][4], ds[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float4 delta = memory.pairs[(row >> 1) + 4 * half + pair];
                    ds[half][0] = delta.x, ds[half][1] = delta.y, ds[half][2] = delta.z, ds[half][3] = delta.w;
                    for (int i = 0; i < 4; ++i) weight[half][i] = half_square[i];
                }
                multiply_transposed<T, Width>(weight, key, queries, 0, offsets);
                multiply_transposed<T, Width>(ds, value, queries, kSecond, offsets);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 lse = reinterpret_cast<const float2*>(memory.numbers + row)[4 * half + pair];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        weight[half][i] = exp2_approximate(fmaf(weight[half][i], scale2, i % 2 ? -lse.y : -lse.x));
                }
                if (!mine.entirely(block)) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        keep_columns(weight, r, mine.columns(r, block), pair);
                        if (packed) keep_columns(ds, r, mine.columns(r, block), pair);
                    }
                }
                if (selected) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t keep = __shfl_sync(kWholeWarp, piece, i / 2 * 8 + 2 * pair + i % 2) >> quad;
                        if (!(keep & 1)) weight[i / 2][i % 2] = 0;
                        if (!(keep & 0x100)) weight[i / 2][2 + i % 2] = 0;
                        if (packed && !(keep & 1)) ds[i / 2][i % 2] = 0;
                        if (packed && !(keep & 0x100)) ds[i / 2][2 + i % 2] = 0;
                    }
                }
                uint32_t a[4];
                round_to_fragment<T>(a, weight);
                multiply<T, Width>(dv, a, queries, kSecond, offsets);
#pragma unroll
                for (int i = 0; i < 8; ++i) ds[i / 4][i % 4] *= weight[i / 4][i % 4];
                round_to_fragment<T>(a, ds);
                multiply<T, Width>(dk, a, queries, 0, offsets);
                mma<T>(ds_total, a, ones, ones);
            }
        }

#pragma unroll
        for (int i = 0; i < Width / 4; ++i)  // word i % 4 of a fragment of keys is row quad + i % 2 * 8 of these columns
            subtract<T>(dk[i / 4 * 2 + i % 4 / 2], i % 2, ds_total[i % 2 * 2], key[i / 4][i % 4]);
        store_rows<T, Width>(dk, unit, lane, num_keys - first_row, arguments.dk.row,
                             arguments.dk.at(batch, kv_head) + first_row * arguments.dk.row);
        store_rows<T, Width>(dv, 1.0f, lane, num_keys - first_row, arguments.dv.row,
                             arguments.dv.at(batch, kv_head) + first_row * arguments.dv.row);
    }
}

}  // namespace
}  // namespace nearfar
