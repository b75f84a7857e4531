// The walk of krause/backward.cu for the gradients of queries and of sigma.
#pragma once

#include <cstdint>

#include "common/constants.cuh"
#include "common/fragments.cuh"
#include "common/reduce.cuh"
#include "krause/backward_walk.cuh"

namespace nearfar {
namespace {

// dq and the gradient of log(scale), over one strip of queries.
template <typename T, int Width>
__device__ void grad_queries(const Arguments<T>& arguments, const Memory<Width>& memory, int outer, int strip) {
    constexpr int kRowBytes = Tile<Width>::kRowBytes, kTileBytes = Memory<Width>::kTileBytes, kSecond = Memory<Width>::kSecond;
    const Window& window = arguments.window;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, pair = lane % 4;
    const LaneOffsets<Width> offsets(lane);
    const int head = outer % arguments.heads, batch = outer / arguments.heads, kv_head = head / arguments.group;
    const T* const q = arguments.q.at(batch, head);
    const T* const k = arguments.k.at(batch, kv_head);
    const T* const v = arguments.v.at(batch, kv_head);
    const T* const o = arguments.o.at(batch, head);
    const T* const grad_o = arguments.grad_o.at(batch, head);
    T* const dq = arguments.dq.at(batch, head);
    const float* const lse = arguments.lse + static_cast<int64_t>(outer) * window.num_queries;
    const int num_words = arguments.num_words;
    const int32_t* const bits = arguments.bits + static_cast<int64_t>(outer) * window.num_queries * num_words;
    const bool selected = arguments.bits != nullptr, packed = window.token_bounds != nullptr;
    const float scale = rbf_scale(arguments.sigma[head * arguments.sigma_stride]), scale2 = scale * kLog2E;
    const uint32_t ones = pack<T>(1.0f, 1.0f);

    const uint32_t my_rows = warp * kRows * kRowBytes;
    float row_lse[2];
    uint32_t word[2];  // `pair` of the selection of rows quad and quad + 8, from the first column on
    const auto fetch_queries = [&](int tile) {
        const int first = tile * kTileRows + warp * kRows;
        copy_rows<Width, kRows, 32>(memory.own + my_rows, q, arguments.q.row, first, window.num_queries, lane);
        copy_rows<Width, kRows, 32>(memory.own + kTileBytes + my_rows, grad_o, arguments.grad_o.row, first, window.num_queries,
                                    lane);
        copy_rows<Width, kRows, 32>(memory.own + 2 * kTileBytes + my_rows, o, arguments.o.row, first, window.num_queries, lane);
    };
    const auto fetch_numbers = [&](int tile) {
        const int first = tile * kTileRows + warp * kRows;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + quad + 8 * r;
            const bool inside = row < window.num_queries;
            row_lse[r] = inside ? lse[row] : 0.0f;
            const int turn = (first + window.offset - window.back) >> 5;
            word[r] = selected && inside ? bits[static_cast<int64_t>(row) * num_words + ((turn + pair) & (num_words - 1))] : 0;
        }
    };
    const auto fetch_keys = [&](int tile, int ring_row) {  // those that query tile `tile` is the first to reach
        const int first = tile * kTileRows + window.offset - window.back + warp * kRows;
        const uint32_t offset = ring_row * kRowBytes + my_rows;
        copy_rows<Width, kRows, 32>(memory.ring + offset, k, arguments.k.row, first, window.num_keys, lane);
        copy_rows<Width, kRows, 32>(memory.ring + kSecond + offset, v, arguments.v.row, first, window.num_keys, lane);
    };
    const auto half_squares = [&](int ring_row) {  // of the keys that this warp has fetched
        uint32_t key[Width / 16][4];
        load_rows<Width>(key, memory.ring + ring_row * kRowBytes + my_rows, offsets);
        const float2 square = row_products<T>(key, key, lane);
        memory.store_pairs(ring_row + warp * kRows, lane, -0.5f * square.x, -0.5f * square.y);
        if (packed) memory.template clean<T>(ring_row * kRowBytes + my_rows, lane);  // the squares say what was not finite
    };

    const int64_t tiles = arguments.query_tiles;
    const int first_tile = static_cast<int>(tiles * strip / arguments.num_strips);
    const int end_tile = static_cast<int>(tiles * (strip + 1) / arguments.num_strips);
    float dlog_scale = 0;
    if (first_tile < end_tile) {
        fetch_queries(first_tile);
        fetch_numbers(first_tile);
        for (int t = 0; t < kRingTiles; ++t) fetch_keys(first_tile + t, t * kTileRows);
    }
    int ring_row = 0;  // of the first key that the tile reaches
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile, ring_row = wrap(ring_row + kTileRows)) {
        const bool more = tile + 1 < end_tile;
        const int first_row = tile * kTileRows + warp * kRows;
        const WarpReach mine(window, first_row, lane);
        wait_for_copies();
        __syncwarp();
        for (int t = tile == first_tile ? 0 : kRingTiles - 1; t < kRingTiles; ++t)
            half_squares(wrap(ring_row + t * kTileRows));
        uint32_t query[Width / 16][4], grad[Width / 16][4], out[Width / 16][4];
        load_rows<Width>(query, memory.own + my_rows, offsets);
        load_rows<Width>(grad, memory.own + kTileBytes + my_rows, offsets);
        load_rows<Width>(out, memory.own + 2 * kTileBytes + my_rows, offsets);
        const float2 delta = row_products<T>(grad, out, lane);
        const float minus_delta[4] = {-delta.x, -delta.x, -delta.y, -delta.y};
        const float shift[2] = {row_lse[0], row_lse[1]};
        uint32_t chosen[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t next = __shfl_sync(kWholeWarp, word[r], (pair + 1) & (num_words - 1), 4);
            chosen[r] = __funnelshift_r(word[r], next, (first_row + window.offset - window.back) & 31);
        }
        __syncthreads();
        if (more) {
            fetch_queries(tile + 1);
            fetch_numbers(tile + 1);
        }

        float sum[Width / 8][4] = {};
        float rounded_total[4] = {};  // of each row, in every column: the sum of what enters dq, with its rounding
        float ds_total[2] = {}, mean_score[2] = {};
        int nearest[2] = {kColumns, kColumns};
#pragma unroll 1
        for (int block = 0; block < arguments.num_blocks; ++block) {
            if (block == kTileBlocks && more) {  // No warp reaches the oldest keys any more: the next ones take their place.
                __syncthreads();
                fetch_keys(tile + kRingTiles, ring_row);
            }
            if (!mine.reaches(block)) continue;
            const int row = wrap(ring_row + (warp + block) * kRows);
            const uint32_t keys = memory.ring + row * kRowBytes;
            float score[2][4], ds[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 square = memory.pairs[(row >> 1) + 4 * half + pair];
                score[half][0] = square.x, score[half][1] = square.y, score[half][2] = square.z, score[half][3] = square.w;
                for (int i = 0; i < 4; ++i) ds[half][i] = minus_delta[i];
            }
            multiply_transposed<T, Width>(score, query, keys, 0, offsets);
            multiply_transposed<T, Width>(ds, grad, keys, kSecond, offsets);
            float weight[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& log_weight = score[i / 4][i % 4];
                log_weight = fmaf(log_weight, scale2, -shift[i / 2 % 2]);
                weight[i / 4][i % 4] = exp2_approximate(log_weight);
            }
            if (selected || !mine.entirely(block)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    uint32_t keep = mine.columns(r, block);
                    if (selected)
                        keep &= __shfl_sync(kWholeWarp, chosen[r], (block / 2) & (num_words - 1), 4) >> block % 2 * kRows;
                    keep_columns(weight, r, keep, pair);
                    if (packed) {
                        keep_columns(score, r, keep, pair);
                        keep_columns(ds, r, keep, pair);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = i / 2 % 2;
                float& gradient = ds[i / 4][i % 4];
                gradient *= weight[i / 4][i % 4];
                ds_total[r] += gradient;
                dlog_scale = fmaf(gradient, score[i / 4][i % 4], dlog_scale);
                mean_score[r] = fmaf(weight[i / 4][i % 4], score[i / 4][i % 4], mean_score[r]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) nearest[r] = max(nearest[r], heaviest(weight, r, kRows * block, pair));
            uint32_t a[4];
            round_to_fragment<T>(a, ds);
            multiply<T, Width>(sum, a, keys, 0, offsets);
            mma<T>(rounded_total, a, ones, ones);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            dlog_scale -= quad_sum(mean_score[r]) * ds_total[r];
            int mark = max(nearest[r], __shfl_xor_sync(kWholeWarp, nearest[r], 1));
            mark = max(mark, __shfl_xor_sync(kWholeWarp, mark, 2));
            if (mark == kColumns) continue;  // no key in reach
            const int column = mark & kColumns;
            const T* const key = k + static_cast<int64_t>(first_row + window.offset - window.back + column) * arguments.k.row;
#pragma unroll
            for (int i = 0; i < Width / 8; ++i)
                subtract<T>(sum[i], r, rounded_total[2 * r], reinterpret_cast<const uint32_t*>(key + 8 * i)[pair]);
        }
        // dS entered products unscaled, so that it neither underflows nor overflows in half precision.
        store_rows<T, Width>(sum, scale, lane, window.num_queries - first_row, arguments.dq.row,
                             dq + first_row * arguments.dq.row);
    }

    dlog_scale = group_sum<32>(dlog_scale) * kLn2;
    __syncthreads();
    if (lane == 0) memory.numbers[warp] = dlog_scale;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (int w = 0; w < kWarps; ++w) total += memory.numbers[w];
        arguments.partials[static_cast<int64_t>(outer) * arguments.num_strips + strip] = total;
    }
}

}  // namespace
}  // namespace nearfar
