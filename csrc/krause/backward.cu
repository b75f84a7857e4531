// Gradients of Krause attention over a window (krause/forward.cu), the selection held constant:
//
//     s_ij = (q_i.k_j - |k_j|^2 / 2) scale      P = 2^(s - lse)      dP = dO V^T      delta_i = dO_i.o_i
//     dS = P (dP - delta)
//     dq_i = scale sum_j dS_ij (k_j - c_i)
//     dk_j = scale (sum_i dS_ij q_i - k_j sum_i dS_ij)                dv_j = sum_i P_ij dO_i
//     d log(scale) = sum_ij dS_ij (s_ij - m_i)
//
// As dS sums to zero in a row, c_i and m_i may be anything, but delta is off by what o lost when it was rounded. With the key
// of greatest weight as c_i that hardly matters, with the mean score sum_j P_ij s_ij as m_i it cancels.
//
// Two kinds of blocks: one walks a strip of consecutive tiles of 64 queries and keeps the keys and values within reach in a
// ring of rows in shared memory; the other walks tiles of keys, with a ring of the queries that see them and their dO. A warp
// owns 16 rows of a tile, whose sums stay in registers, and takes the ring in blocks of 16 rows: those that its own rows
// reach and no others. Each row is fetched once a strip; nothing is added atomically.
//
// Both kinds read nearly the same tensors. Blocks of the two alternate in one grid, over the same stretch of tokens at about
// the same time, so what one fetches from memory the other finds in the second-level cache.
#include "krause/backward.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <climits>
#include <cstdint>
#include <stdexcept>

#include "common/check.h"
#include "common/constants.cuh"
#include "common/fragments.cuh"
#include "common/occupancy.h"
#include "common/reduce.cuh"
#include "common/tensor.cuh"
#include "common/tile.cuh"
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
constexpr int kStripTiles = 6;  // of 6, 11, 16, 22 and 43 the fastest (docs/krause.md)

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

// What a block keeps in shared memory: a ring of rows of two matrices, with two numbers a row, and three tiles of its own.
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
        // dS entered its products unscaled, lest half precision lose or overflow it.
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
        memory.template clean<T>(ring_row * kRowBytes + my_rows, lane);  // lse says what was not finite
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

template <typename T, int Width>
__global__ void __launch_bounds__(kThreads, Width <= 64 ? 3 : 1)
krause_backward_kernel(const __grid_constant__ Arguments<T> arguments) {
    extern __shared__ __align__(128) uint4 memory[];
    const Memory<Width> shared(memory);
    const int index = blockIdx.x / 2;
    if (blockIdx.x % 2 == 0) {
        grad_queries<T, Width>(arguments, shared, index / arguments.num_strips, index % arguments.num_strips);
    } else {
        const int num_strips = arguments.num_strips * arguments.group;
        grad_keys<T, Width>(arguments, shared, index / num_strips, index % num_strips, num_strips);
    }
}

// dsigma from the partial sums of grad_queries, in a fixed order: log(scale) = -2 log(sigma). One block a number, of which
// `share` consecutive partials of each batch are.
constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
grad_sigma_kernel(const float* partials, const float* sigma, float* dsigma, int batches, int share) {
    __shared__ float warp_total[kSumThreads / 32];
    float total = 0;
    for (int batch = 0; batch < batches; ++batch) {
        const float* const from = partials + (static_cast<int64_t>(batch) * gridDim.x + blockIdx.x) * share;
        for (int i = threadIdx.x; i < share; i += kSumThreads) total += from[i];
    }
    total = group_sum<32>(total);
    if (threadIdx.x % 32 == 0) warp_total[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    total = 0;
    for (const float part : warp_total) total += part;
    dsigma[blockIdx.x] = -2.0f * total / sigma[blockIdx.x];
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Strips of a query head. Short ones keep the two kinds of blocks at the same tokens, though each has to fill its ring first;
// yet shorter ones where the device would not be full otherwise.
int64_t strips(int64_t tiles, int64_t heads, int64_t resident) {
    return std::max(ceil_div(tiles, kStripTiles), std::clamp<int64_t>(resident / (2 * heads), 1, tiles));
}

template <typename T, int Width>
void launch(const KrauseBackward& call, cudaStream_t stream) {
    const int back = static_cast<int>(call.back), ahead = static_cast<int>(call.ahead), size = back + ahead + 1;
    const int num_queries = static_cast<int>(call.num_queries), num_keys = static_cast<int>(call.num_keys);
    const int num_blocks = std::max<int>(ceil_div(kRows + size - 1, kRows), kTileBlocks + 1);
    const int64_t heads = call.batches * call.heads;
    const int64_t tiles = ceil_div(std::max(num_queries, num_keys), kTileRows);
    constexpr auto kKernel = krause_backward_kernel<T, Width>;
    constexpr int kBytes = Memory<Width>::kBytes;
    const int64_t num_strips = strips(tiles, heads, resident_blocks<kKernel>(kThreads, kBytes));

    const auto input = input_tensor<T>;
    const auto output = output_tensor<T>;
    Arguments<T> arguments{
        input(call.q, call.q_strides), input(call.k, call.k_strides), input(call.v, call.v_strides),
        input(call.o, call.o_strides), input(call.grad_o, call.grad_o_strides),
        output(call.dq, call.dq_strides), output(call.dk, call.dk_strides), output(call.dv, call.dv_strides),
        call.sigma, call.lse, call.bits, call.partials, call.sigma_stride,
        Window{num_keys - num_queries, back, ahead, call.token_bounds, num_queries, num_keys},
        Window{num_queries - num_keys, ahead, back, call.token_bounds, num_keys, num_queries},
        static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads),
        static_cast<int>(ceil_div(num_queries, kTileRows)), static_cast<int>(ceil_div(num_keys, kTileRows)),
        static_cast<int>(num_strips), size <= 64 ? 2 : 4, num_blocks};
    void* parameters[] = {&arguments};
    check(cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(2 * heads * num_strips)), dim3(kThreads), parameters,
                           kBytes, stream),
          "krause_backward launch");

    const int64_t numbers = call.sigma_stride == 0 ? 1 : call.heads;
    int batches = static_cast<int>(call.batches), share = static_cast<int>(call.heads / numbers * num_strips);
    const float *partials = call.partials, *sigma = call.sigma;
    float* dsigma = call.dsigma;
    void* sum_parameters[] = {&partials, &sigma, &dsigma, &batches, &share};
    check(cudaLaunchKernel(grad_sigma_kernel, dim3(static_cast<unsigned>(numbers)), dim3(kSumThreads),
                           sum_parameters, 0, stream),
          "grad_sigma launch");
}

}  // namespace

int64_t krause_backward_shared_bytes(int64_t width) {
    return width == 32 ? Memory<32>::kBytes : width == 64 ? Memory<64>::kBytes : Memory<128>::kBytes;
}

void krause_backward(const KrauseBackward& call, DType dtype, cudaStream_t stream) {
    if (call.back < 0 || call.ahead < 0 || call.back + call.ahead + 1 > kKrauseWindow)
        throw std::invalid_argument("a window of 1 to 128 keys is served, back and ahead not negative");
    dispatch_half_and_width(dtype, call.width, [&](auto* type, auto width) {
        launch<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

}  // namespace nearfar
