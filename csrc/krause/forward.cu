// Krause attention over a window of at most 128 keys: softmax of (q.k - |k|^2 / 2) / sigma^2 over the top_k best of them.
//
// A warp has 16 queries and the 16 + window - 1 keys that they reach; their scores stay in its registers from the first
// product to the second, so selection needs no other warp. (A warpgroup, the unit of wgmma, would hold 64 queries and a third
// more scores.) Four warps walk a strip of consecutive tiles of 64 queries. The keys and values within their reach lie in
// a ring of rows in shared memory: each is fetched once a strip, the next ones while a tile is computed.
#include "krause/forward.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "common/check.h"
#include "common/constants.cuh"
#include "common/occupancy.h"
#include "common/tile.cuh"
#include "krause/clean.cuh"
#include "krause/select.cuh"
#include "krause/window.cuh"

namespace nearfar {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;                    // queries of a warp
constexpr int kTileRows = kWarps * kRows;    // queries, and keys, of a tile

struct Strides {
    int64_t batch, head, row;
};

template <typename T>
struct Arguments {
    const T *q, *k, *v;
    const float* sigma;
    T* o;
    float* lse;
    int32_t* bits;
    Strides q_strides, k_strides, v_strides, o_strides;
    int64_t sigma_stride;
    Window window;
    int heads, group, num_tiles, num_strips, top_k;
};

// What a strip keeps in shared memory. Blocks: blocks of 16 keys that the queries of a warp reach.
template <int Width, int Blocks>
struct Ring {
    static constexpr int kTiles = (kTileRows - kRows + 16 * Blocks + kTileRows - 1) / kTileRows;  // that a query tile reaches
    static constexpr bool kSpare = kTiles * Width < 384;  // one tile more, unless that leaves a multiprocessor one block
    static constexpr int kRingRows = (kTiles + kSpare) * kTileRows;
    static constexpr int kRowBytes = Tile<Width>::kRowBytes;
    static constexpr int kBytes = (2 * kRingRows + kTileRows) * kRowBytes + kRingRows * static_cast<int>(sizeof(float));
    // Three blocks hide more latency than two, but not the spills that scores of 144 keys beside 64 numbers of a row then cost.
    static constexpr bool kCrowded = Width == 64 && Blocks == 9;
    static constexpr int kBlocksPerMultiprocessor = std::min(kCrowded ? 2 : 3, 228 * 1024 / (kBytes + 1024));

    __device__ static int wrap(int row) { return row < kRingRows ? row : row - kRingRows; }
    // Bytes from the start of the ring to a block of keys; no block lies across its end.
    __device__ static uint32_t offset(int row) { return wrap(row) * kRowBytes; }
};

// -|x|^2 / 2 of 16 rows of a tile: half the diagonal of their products with themselves.
template <typename T, int Width>
__device__ __forceinline__ void half_squares(uint32_t rows, int lane, float* squares) {
    using Tile = Tile<Width>;
    float first[4] = {}, last[4] = {};  // rows 0-7 by rows 0-7; rows 8-15 by rows 8-15, in its lower half
#pragma unroll
    for (int step = 0; step < Width / 16; ++step) {
        uint32_t x[4];
        load_matrices(x, rows + Tile::offset(LaneAcross::row(lane), 2 * step + LaneAcross::chunk(lane)));
        const uint32_t a[4] = {x[0], x[2], x[1], x[3]};
        mma<T>(first, a, x[0], x[1]);
        mma<T>(last, a, x[2], x[3]);
    }
    const int quad = lane / 4, odd = quad % 2;
    if (lane % 4 == quad / 2) {
        squares[quad] = -0.5f * (odd ? first[1] : first[0]);
        squares[quad + 8] = -0.5f * (odd ? last[3] : last[2]);
    }
}

// score = q.k - |k|^2 / 2 of a warp's queries and the keys from ring row `first` on. It is scaled last, within the exponent, so
// that equal distances give equal scores.
template <typename T, int Width, int Blocks>
__device__ __forceinline__ void score_keys(uint32_t queries, uint32_t keys, const float* squares, int first, int lane,
                                           float (&score)[2 * Blocks][4]) {
    using Tile = Tile<Width>;
    using Ring = Ring<Width, Blocks>;
    uint32_t query[Width / 16][4];
#pragma unroll
    for (int step = 0; step < Width / 16; ++step)
        load_matrices(query[step], queries + Tile::offset(LaneNormal::row(lane), 2 * step + LaneNormal::chunk(lane)));
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
        float(&left)[4] = score[2 * block], (&right)[4] = score[2 * block + 1];
        const float2* square = reinterpret_cast<const float2*>(squares + Ring::wrap(first + 16 * block)) + lane % 4;
        left[0] = left[2] = square[0].x, left[1] = left[3] = square[0].y;
        right[0] = right[2] = square[4].x, right[1] = right[3] = square[4].y;
        const uint32_t from = keys + Ring::offset(first + 16 * block);
#pragma unroll
        for (int step = 0; step < Width / 16; ++step) {
            uint32_t key[4];
            load_matrices(key, from + Tile::offset(LaneAcross::row(lane), 2 * step + LaneAcross::chunk(lane)));
            mma<T>(left, query[step], key[0], key[1]);
            mma<T>(right, query[step], key[2], key[3]);
        }
    }
}

// Sets scores outside the columns [begin, begin + count) of their rows to -infinity, and finds the extremes of the others.
// whole: every row r of 16 has the 16 (Blocks - 1) columns from r on, so that only the outer blocks need the mask.
template <int Blocks, bool Lowest>
__device__ __forceinline__ void mask_scores(float (&score)[2 * Blocks][4], const int (&begin)[2], const int (&count)[2],
                                            bool whole, int lane, float (&lowest)[2], float (&highest)[2]) {
    const auto survey = [&](int tile, bool masked) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i / 2;
            float& x = score[tile][i];
            const unsigned rank = 8 * tile + 2 * (lane % 4) + i % 2 - begin[r];
            const bool visible = !masked || rank < static_cast<unsigned>(count[r]);
            if (Lowest) lowest[r] = fminf(lowest[r], visible ? x : INFINITY);
            if (!visible) x = -INFINITY;
            highest[r] = fmaxf(highest[r], x);
        }
    };
    lowest[0] = lowest[1] = INFINITY;
    highest[0] = highest[1] = -INFINITY;
#pragma unroll
    for (int tile : {0, 1, 2 * Blocks - 2, 2 * Blocks - 1}) survey(tile, true);
    if (whole) {
#pragma unroll
        for (int tile = 2; tile < 2 * Blocks - 2; ++tile) survey(tile, false);
    } else {
#pragma unroll
        for (int tile = 2; tile < 2 * Blocks - 2; ++tile) survey(tile, true);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        highest[r] = quad_max(highest[r]);
        if (Lowest) lowest[r] = quad_min(lowest[r]);
    }
}

// acc += weights V and total += weights, for weights exp2(score * scale - shift) in the precision of V.
template <typename T, int Width, int Blocks>
__device__ __forceinline__ void add_values(const float (&score)[2 * Blocks][4], float scale, const float (&shift)[2],
                                           uint32_t values, int first, int lane, float (&total)[2],
                                           float (&acc)[Width / 8][4]) {
    using Tile = Tile<Width>;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
        uint32_t weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i % 2;
            const float(&pair)[4] = score[2 * block + i / 2];
            const float left = exp2_approximate(fmaf(pair[2 * r], scale, -shift[r]));
            const float right = exp2_approximate(fmaf(pair[2 * r + 1], scale, -shift[r]));
            total[r] += left + right;
            weight[i] = pack<T>(left, right);
        }
        const uint32_t from = values + Ring<Width, Blocks>::offset(first + 16 * block);
#pragma unroll
        for (int step = 0; step < Width / 16; ++step) {
            uint32_t value[4];
            load_matrices_transposed(
                value, from + Tile::offset(LaneNormal::row(lane), 2 * step + LaneNormal::chunk(lane)));
            mma<T>(acc[2 * step], weight, value[0], value[1]);
            mma<T>(acc[2 * step + 1], weight, value[2], value[3]);
        }
    }
}

// The bits of a row's selection: kept columns of block i are bits 16 i on, modulo the ring. Products with powers of two add
// them up to 16 bits a block, the lanes of a quad get 32 each. The ring then turns until bit j stands for key j.
template <int Blocks>
__device__ __forceinline__ void store_selection(const TopK<Blocks>& selection, int first_key, int lane, int rows_left,
                                                int32_t* bits) {
    constexpr int kPieces = Blocks - 1, kWords = kPieces / 2;
    const int quad = lane / 4, pair = lane % 4;
    float pieces[4] = {};
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
        // 2^i in row i of the column of this block, as halves.
        const uint32_t low = (15 + 2 * pair) << 10 | (16 + 2 * pair) << 26, high = low + (8 << 10 | 8 << 26);
        const bool mine = quad == block % kPieces;
        mma<__half>(pieces, selection.kept(block), mine ? low : 0, mine ? high : 0);
    }
    const int shift = first_key & 31, turn = first_key >> 5;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t word = static_cast<uint32_t>(pieces[2 * r]) | static_cast<uint32_t>(pieces[2 * r + 1]) << 16;
        const uint32_t previous = __shfl_sync(kWholeWarp, word, (pair + kWords - 1) % kWords, 4);
        const int row = quad + 8 * r;
        if (pair < kWords && row < rows_left)
            bits[row * kWords + (pair + turn & kWords - 1)] = static_cast<int32_t>(__funnelshift_l(previous, word, shift));
    }
}

// Rows quad and quad + 8 of a warp's output: neighbouring lanes swap words, so that each stores 8 bytes, a quad 32.
template <typename T, int Width>
__device__ __forceinline__ void store_output(const float (&acc)[Width / 8][4], const float (&inverse)[2], int lane,
                                             int rows_left, int64_t stride, T* o) {
    const int quad = lane / 4, pair = lane % 4, odd = lane % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = quad + 8 * r;
        T* to = o + row * stride + 8 * odd + 2 * (pair - odd);
#pragma unroll
        for (int tile = 0; tile < Width / 8; tile += 2) {
            const uint32_t left = pack<T>(acc[tile][2 * r] * inverse[r], acc[tile][2 * r + 1] * inverse[r]);
            const uint32_t right = pack<T>(acc[tile + 1][2 * r] * inverse[r], acc[tile + 1][2 * r + 1] * inverse[r]);
            const uint32_t received = __shfl_xor_sync(kWholeWarp, odd ? left : right, 1);
            if (row < rows_left)
                *reinterpret_cast<uint2*>(to + 8 * tile) = odd ? make_uint2(received, right) : make_uint2(left, received);
        }
    }
}

template <typename T, int Width, int Blocks, bool Select>
__global__ void __launch_bounds__(kThreads, Ring<Width, Blocks>::kBlocksPerMultiprocessor)
krause_forward_kernel(const __grid_constant__ Arguments<T> arguments) {
    using Ring = Ring<Width, Blocks>;
    using Tile = Tile<Width>;
    extern __shared__ uint4 memory[];
    uint4* const key_rows = memory;
    uint4* const value_rows = key_rows + Ring::kRingRows * Tile::kChunks;
    uint4* const query_rows = value_rows + Ring::kRingRows * Tile::kChunks;
    float* const squares = reinterpret_cast<float*>(query_rows + kTileRows * Tile::kChunks);

    const Window& window = arguments.window;
    const bool packed = window.token_bounds != nullptr;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, pair = lane % 4;
    const int strip = blockIdx.x % arguments.num_strips, outer = blockIdx.x / arguments.num_strips;
    const int head = outer % arguments.heads, batch = outer / arguments.heads, kv_head = head / arguments.group;
    const auto at = [&](auto* base, const Strides& strides, int h) { return base + batch * strides.batch + h * strides.head; };
    const T* const q = at(arguments.q, arguments.q_strides, head);
    const T* const k = at(arguments.k, arguments.k_strides, kv_head);
    const T* const v = at(arguments.v, arguments.v_strides, kv_head);
    T* const o = at(arguments.o, arguments.o_strides, head);
    const int64_t row_offset = static_cast<int64_t>(outer) * window.num_queries;

    const float sigma = arguments.sigma[head * arguments.sigma_stride];
    // One that is not positive poisons its head. A scale of 0 would turn the -infinity of masked scores into NaN.
    const float scale = sigma > 0 ? fmaxf(1.0f / (sigma * sigma), FLT_MIN) * kLog2E : NAN;

    const int64_t tiles = arguments.num_tiles;
    const int first_tile = static_cast<int>(tiles * strip / arguments.num_strips);
    const int end_tile = static_cast<int>(tiles * (strip + 1) / arguments.num_strips);

    // A warp copies the same 16 rows of every tile, and computes their squares without waiting for the others.
    const uint32_t keys = shared_address(key_rows), values = shared_address(value_rows);
    const uint32_t queries = shared_address(query_rows) + warp * kRows * Tile::kRowBytes;
    const auto fetch_keys = [&](int tile, int ring_row) {  // those that query tile `tile` is the first to reach
        const int first = tile * kTileRows + warp * kRows + window.offset - window.back;
        const uint32_t offset = (ring_row + warp * kRows) * Tile::kRowBytes;
        copy_rows<Width, kRows, 32>(keys + offset, k, arguments.k_strides.row, first, window.num_keys, lane);
        copy_rows<Width, kRows, 32>(values + offset, v, arguments.v_strides.row, first, window.num_keys, lane);
    };
    const auto fetch_queries = [&](int tile) {
        const int first = tile * kTileRows + warp * kRows;
        copy_rows<Width, kRows, 32>(queries, q, arguments.q_strides.row, first, window.num_queries, lane);
    };
    const auto square_keys = [&](int ring_row) {
        const int row = ring_row + warp * kRows;
        half_squares<T, Width>(keys + row * Tile::kRowBytes, lane, squares + row);
        if (packed) {  // a key whose value is not finite makes the scores NaN that see it
            __syncwarp();
            clean_rows<T, Width>(value_rows + row * Tile::kChunks, lane, squares + row);
        }
    };

    fetch_queries(first_tile);
    for (int tile = 0; tile < Ring::kTiles; ++tile) fetch_keys(first_tile + tile, tile * kTileRows);
    wait_for_copies();
    __syncwarp();
    for (int tile = 0; tile < Ring::kTiles - 1; ++tile) square_keys(tile * kTileRows);

    int ring_row = 0;  // of the first key that the tile reaches
    for (int tile = first_tile; tile < end_tile; ++tile, ring_row = Ring::wrap(ring_row + kTileRows)) {
        const int newest = Ring::wrap(ring_row + (Ring::kTiles - 1) * kTileRows);
        const int next = Ring::wrap(newest + kTileRows);
        wait_for_copies();
        __syncwarp();
        square_keys(newest);
        __syncthreads();
        const bool more = tile + 1 < end_tile;
        if (Ring::kSpare && more) fetch_keys(tile + Ring::kTiles, next);

        const int first_row = tile * kTileRows + warp * kRows;
        const int first_key = first_row + window.offset - window.back;
        const int first_ring_row = ring_row + warp * kRows;
        int begin[2], count[2];  // the columns of each row, relative to first_key
        bool whole = true;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Reach row_reach = reach(window, first_row + quad + 8 * r);
            begin[r] = row_reach.begin - first_key;
            count[r] = row_reach.count();
            whole = whole && begin[r] == quad + 8 * r && count[r] == 16 * (Blocks - 1);
        }
        whole = __all_sync(kWholeWarp, whole);

        float score[2 * Blocks][4], lowest[2], highest[2];
        score_keys<T, Width, Blocks>(queries, keys, squares, first_ring_row, lane, score);
        __syncwarp();  // all lanes have their queries
        if (more) fetch_queries(tile + 1);
        mask_scores<Blocks, Select>(score, begin, count, whole, lane, lowest, highest);
        const int rows_left = window.num_queries - first_row;
        if constexpr (Select) {
            const TopK<Blocks> selection(score, count, lowest, highest, arguments.top_k);
            store_selection(selection, first_key, lane, rows_left,
                            arguments.bits + (row_offset + first_row) * ((Blocks - 1) / 2));
        }

        // Rows without keys, all -infinity, are shifted by 0. The rounding of a shift is that of every weight of its row and
        // cancels, unless it leaves the range of exp2: then the highest score is taken off first.
        float shift[2], top[2], total[2] = {}, acc[Width / 8][4] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) top[r] = shift[r] = highest[r] == -INFINITY ? 0.0f : highest[r] * scale;
        if (__any_sync(kWholeWarp, fmaxf(fabsf(shift[0]), fabsf(shift[1])) > 0x1p20f)) {
#pragma unroll
            for (int i = 0; i < 8 * Blocks; ++i)
                if (shift[i / 2 % 2] != 0) score[i / 4][i % 4] -= highest[i / 2 % 2];
            shift[0] = shift[1] = 0;
        }
        add_values<T, Width, Blocks>(score, scale, shift, values, first_ring_row, lane, total, acc);

        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] = quad_sum(total[r]);
            inverse[r] = count[r] > 0 ? reciprocal(total[r]) : 0.0f;
            const int row = quad + 8 * r;
            if (pair == 0 && row < rows_left)
                arguments.lse[row_offset + first_row + row] = count[r] > 0 ? top[r] + __log2f(total[r]) : 0.0f;
        }
        store_output<T, Width>(acc, inverse, lane, rows_left, arguments.o_strides.row,
                               o + first_row * arguments.o_strides.row);

        if (!Ring::kSpare && more) {
            __syncthreads();  // every warp is done with the tile that the next one replaces
            fetch_keys(tile + Ring::kTiles, next);
        }
    }
}

// Strips of a head, so that all multiprocessors are busy to the end: whole waves of blocks, few tiles fetched in vain.
int64_t strips(int64_t tiles, int64_t outer, int64_t resident, int64_t warm_up) {
    int64_t best = 1, best_time = INT64_MAX;
    for (int64_t waves = 1; waves <= 4; ++waves) {
        const int64_t count = std::clamp<int64_t>(waves * resident / outer, 1, tiles);
        const int64_t time = (count * outer + resident - 1) / resident * ((tiles + count - 1) / count + warm_up);
        if (time < best_time) best = count, best_time = time;
    }
    return best;
}

template <typename T, int Width, int Blocks, bool Select>
void launch(const KrauseForward& call, cudaStream_t stream) {
    using Ring = Ring<Width, Blocks>;
    constexpr auto kKernel = krause_forward_kernel<T, Width, Blocks, Select>;
    const int resident = resident_blocks<kKernel>(kThreads, Ring::kBytes);
    const auto strides = [](const std::array<int64_t, 3>& s) { return Strides{s[0], s[1], s[2]}; };
    const int64_t outer = call.batches * call.heads, tiles = (call.num_queries + kTileRows - 1) / kTileRows;
    const int64_t num_strips = strips(tiles, outer, resident, Ring::kTiles - 1);
    const Window window{static_cast<int>(call.num_keys - call.num_queries), static_cast<int>(call.back),
                        static_cast<int>(call.ahead), call.token_bounds,
                        static_cast<int>(call.num_queries), static_cast<int>(call.num_keys)};
    Arguments<T> arguments{static_cast<const T*>(call.q), static_cast<const T*>(call.k), static_cast<const T*>(call.v),
                           call.sigma, static_cast<T*>(call.o), call.lse, call.bits,
                           strides(call.q_strides), strides(call.k_strides), strides(call.v_strides),
                           strides(call.o_strides), call.sigma_stride, window,
                           static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads),
                           static_cast<int>(tiles), static_cast<int>(num_strips), static_cast<int>(call.top_k)};
    void* parameters[] = {&arguments};
    check(cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(outer * num_strips)), dim3(kThreads), parameters,
                           Ring::kBytes, stream),
          "krause_forward launch");
}

template <typename T, int Width>
void launch_window(const KrauseForward& call, cudaStream_t stream) {
    const bool narrow = call.back + call.ahead + 1 <= 64;
    if (call.top_k > 0) narrow ? launch<T, Width, 5, true>(call, stream) : launch<T, Width, 9, true>(call, stream);
    else narrow ? launch<T, Width, 5, false>(call, stream) : launch<T, Width, 9, false>(call, stream);
}

template <int Width>
int64_t shared_bytes(int64_t window) {
    return window <= 64 ? Ring<Width, 5>::kBytes : Ring<Width, 9>::kBytes;
}

}  // namespace

int64_t krause_forward_shared_bytes(int64_t width, int64_t window) {
    return width <= 32 ? shared_bytes<32>(window) : width <= 64 ? shared_bytes<64>(window) : shared_bytes<128>(window);
}

void krause_forward(const KrauseForward& call, DType dtype, cudaStream_t stream) {
    if (call.back < 0 || call.ahead < 0 || call.back + call.ahead + 1 > kKrauseWindow)
        throw std::invalid_argument("a window of 1 to 128 keys is served, back and ahead not negative");
    dispatch_half_and_width(dtype, call.width, [&](auto* type, auto width) {
        launch_window<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

}  // namespace nearfar
