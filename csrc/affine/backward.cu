// Gradients of softmax attention with an affine epilogue, in two walks over all pairs: queries visit the keys that they see,
// for dq, and keys the queries that see them, for dk and dv. With P the weights, dP = dO v^T and m the row sums of u dO,
//
//     dS = P (alpha dP - alpha m),   dq = scale dS k,   dk = scale dS^T q,   dv = (alpha P + beta)^T dO
//
// u was rounded to 16 bits, and so were the weights in it. The gradients of alpha and of the sink are m and a sum of m, so for
// them the queries' walk sums P dP over each row in float32, which gives m without that rounding. dk uses these sums too.
//
// Two warp groups have 64 rows each and multiply them with tiles of the other side: two products give the weights of a tile,
// and one or two more add its contribution. While one group computes weights, the products of the other run. One thread of a
// third group copies tiles ahead. Blocks take one span of 128 rows after the other (spans.cuh).
#include "affine/backward.h"

#include <cstdint>
#include <type_traits>

#include "affine/backward_walk.cuh"
#include "affine/forward.h"
#include "common/fragments.cuh"
#include "common/pairs_launch.cuh"
#include "common/spans_launch.cuh"

namespace nearfar {
namespace {

// The columns that a thread's two rows, 8 apart, reach in a tile that starts at `first`.
struct Reach {
    int begin[2], end[2];

    __device__ Reach(const Band& band, int row, int first)
        : begin{band.begin(row) - first, band.begin(row + 8) - first}, end{band.end(row) - first, band.end(row + 8) - first} {}
    // Element i of the products.
    __device__ bool contains(int i) const {
        const int column = product_column(threadIdx.x % 32, i), r = i / 2 % 2;
        return column >= begin[r] && column < end[r];
    }
};

// Fragments of a tile's weights, in the order of the products' elements.
template <typename Traits>
using Weights = uint32_t[Traits::kTile / 16][4];

// A thread's data of its queries: for each of two rows the log-sum-exp in base 2, m computed from u, alpha, and the lane's part
// of dbeta and of exact m.
template <typename Traits>
struct Queries {
    using Number = typename Traits::Number;
    using Products = float[1][Traits::kTile / 2];
    static constexpr int kChunks = Traits::kWidth / 16;  // of 16 bytes, of half a row

    float lse[2], m[2], alpha[2], dbeta[2], exact[2] = {};
    int edge;  // values before it are seen by all queries of the block: dbeta has their running sums

    // Forms m by u, dbeta of the values before the edge, and the terms for the keys but what follows from exact m. Two threads
    // have a row, half of its columns each: those of a warp have its 16 rows.
    __device__ Queries(const Arguments<Number>& arguments, const Places<Traits>& places, const char* memory,
                       const Span<Traits>& span, int nth) {
        const Band& band = arguments.band;
        const int lane = threadIdx.x % 32, half = lane % 2, group = threadIdx.x / 128, local = threadIdx.x / 2;
        const int row = span.first_row + local, seen_by_all = max(0, band.end(span.first_row));
        const bool there = row < band.num_rows;
        const int64_t index = static_cast<int64_t>(span.batch) * arguments.heads + span.head;
        const int64_t at = index * band.num_rows + min(row, band.num_rows - 1);
        const int chunks = (band.num_others + kAffineChunk - 1) / kAffineChunk;
        const int whole = seen_by_all < band.num_others ? seen_by_all / kAffineChunk : chunks;
        edge = whole * kAffineChunk;

        // What is in global memory is on its way while the rows are copied.
        const Number* const u = arguments.u.at(span.batch, span.head) + row * arguments.u.row + half * 8 * kChunks;
        uint4 mine[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; ++i) mine[i] = there ? reinterpret_cast<const uint4*>(u)[i] : uint4{};
        float terms[4] = {arguments.lse[at], 0, 1, 0};
        if (arguments.alpha != nullptr) terms[kAlpha] = arguments.alpha[at];
        if (arguments.beta != nullptr) terms[kBeta] = arguments.beta[at];
        const int64_t kv_index = static_cast<int64_t>(span.batch) * (arguments.heads / arguments.group) + span.other_head;
        const float* const sums = arguments.sums + (kv_index * chunks + whole - 1) * Traits::kWidth + half * 8 * kChunks;
        const bool biased = arguments.beta != nullptr && whole > 0;

        places.own_rows.wait_full(group, nth);
        float product = 0, bias = 0;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int chunk = half * kChunks + i;
            const uint4 grad = *reinterpret_cast<const uint4*>(memory + Traits::kOwnBytes + chunk / 8 * Traits::kOwnPanel +
                                                               Tile<64>::offset(local, chunk % 8));
            const uint32_t left[4] = {mine[i].x, mine[i].y, mine[i].z, mine[i].w}, right[4] = {grad.x, grad.y, grad.z, grad.w};
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const float2 x = unpack<Number>(left[word]), y = unpack<Number>(right[word]);
                product = fmaf(x.x, y.x, fmaf(x.y, y.y, product));
                if (!biased) continue;
                const float2 sum = reinterpret_cast<const float2*>(sums)[4 * i + word];
                bias = fmaf(sum.x, y.x, fmaf(sum.y, y.y, bias));
            }
        }
        product += __shfl_xor_sync(kWholeWarp, product, 1);
        bias += __shfl_xor_sync(kWholeWarp, bias, 1);
        terms[kShift] = terms[kAlpha] * product;
        if (half == 0) {
            if (there && !Traits::kExact) arguments.m[at] = product;
            float* const to = arguments.terms + index * arguments.padded_queries + row;  // of all rows that keys copy
#pragma unroll
            for (int i = 0; i < Traits::kTerms; ++i)
                if (i != kShift || !Traits::kExact) to[i * arguments.terms_apart] = terms[i];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int from = lane / 4 * 2 + 16 * r;
            lse[r] = __shfl_sync(kWholeWarp, terms[kLevel], from), m[r] = __shfl_sync(kWholeWarp, product, from);
            alpha[r] = __shfl_sync(kWholeWarp, terms[kAlpha], from), dbeta[r] = __shfl_sync(kWholeWarp, bias, from);
            if (lane % 4 > 0) dbeta[r] = 0;  // lanes of a row add theirs up at the end
        }
    }

    // dS without alpha, of a tile whose second products may still run.
    __device__ __forceinline__ void weigh(Products& score, Products& slope, Weights<Traits> (&weights)[1],
                                          const Arguments<Number>& arguments, int row, int first, bool cut, int) {
#pragma unroll
        for (int i = 0; i < Traits::kTile / 2; ++i)
            score[0][i] = exp2_approximate(fmaf(score[0][i], arguments.factor, -lse[i / 2 % 2]));
        wait_for_products<0>(slope);
        if (cut || (Traits::kScaled && first >= edge)) {
            const Reach reach(arguments.band, row, first);
#pragma unroll
            for (int i = 0; i < Traits::kTile / 2; ++i) {
                if (!reach.contains(i)) score[0][i] = slope[0][i] = 0;
                if (Traits::kScaled && first >= edge) dbeta[i / 2 % 2] += slope[0][i];
            }
        }
#pragma unroll
        for (int i = 0; i < Traits::kTile / 4; ++i) {
            const float x = score[0][2 * i] * (slope[0][2 * i] - m[i % 2]);
            const float y = score[0][2 * i + 1] * (slope[0][2 * i + 1] - m[i % 2]);
            if constexpr (Traits::kExact)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    exact[i % 2] = fmaf(score[0][2 * i + c], slope[0][2 * i + c], exact[i % 2]);
            weights[0][i / 4][i % 4] = pack<Number>(x, y);
        }
    }

    __device__ void finish(const Arguments<Number>& arguments, const Span<Traits>& span, int row,
                           float (&sums)[1][Traits::kWidth / 2]) const {
        const int64_t index = static_cast<int64_t>(span.batch) * arguments.heads + span.head;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row_r = row + 8 * r;
            const int64_t at = index * arguments.band.num_rows + row_r;
            const bool there = row_r < arguments.band.num_rows;
            const float total = quad_sum(dbeta[r]), product = quad_sum(exact[r]);
            if (threadIdx.x % 4 > 0) continue;
            if (arguments.dbeta != nullptr && there) arguments.dbeta[at] = total;
            if (!Traits::kExact) continue;
            if (there) arguments.m[at] = product;
            arguments.terms[kShift * arguments.terms_apart + index * arguments.padded_queries + row_r] = alpha[r] * product;
        }
#pragma unroll
        for (int i = 0; i < Traits::kWidth / 2; ++i) sums[0][i] *= alpha[i / 2 % 2];
    }
};

// Keys read the terms of the queries from each slot.
template <typename Traits>
struct Keys {
    using Number = typename Traits::Number;
    using Products = float[1][Traits::kTile / 2];
    const char* memory;

    __device__ Keys(const Arguments<Number>&, const Places<Traits>& places, const char* memory, const Span<Traits>&, int nth)
        : memory(memory) {
        places.own_rows.wait_full(threadIdx.x / 128, nth);
    }

    // The transposed weights of dO in dv, and of q in dk.
    __device__ __forceinline__ void weigh(Products& score, Products& slope, Weights<Traits> (&weights)[2],
                                          const Arguments<Number>& arguments, int row, int first, bool cut, int step) {
        wait_for_products<0>(slope);
        const auto* const terms = reinterpret_cast<const float*>(memory + Places<Traits>::terms(step));
        weigh(score[0], slope[0], weights, terms, arguments.factor);
        if (!cut) return;
        const Reach reach(arguments.band, row, first);
#pragma unroll
        for (int i = 0; i < Traits::kTile / 4; ++i) {
            const uint32_t seen = (reach.contains(2 * i) ? 0x0000ffffu : 0) | (reach.contains(2 * i + 1) ? 0xffff0000u : 0);
            for (auto& words : weights) words[i / 4][i % 4] &= seen;
        }
    }

    __device__ void finish(const Arguments<Number>&, const Span<Traits>&, int, float (&)[2][Traits::kWidth / 2]) const {}

   private:
    // Everything for two columns together, so that their terms are loaded once.
    __device__ __forceinline__ void weigh(const float (&score)[Traits::kTile / 2], const float (&slope)[Traits::kTile / 2],
                                          Weights<Traits> (&weights)[2], const float* terms, float factor) {
#pragma unroll
        for (int columns = 0; columns < Traits::kTile / 8; ++columns) {
            float term[Traits::kTerms][2];
#pragma unroll
            for (int i = 0; i < Traits::kTerms; ++i) {
                const float* const first = terms + i * Traits::kTile + product_column(threadIdx.x % 32, 4 * columns);
                const auto two = *reinterpret_cast<const float2*>(first);
                term[i][0] = two.x, term[i][1] = two.y;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float of_values[2], of_keys[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int i = 4 * columns + 2 * r + c;
                    const float weight = exp2_approximate(fmaf(score[i], factor, -term[kLevel][c]));
                    float scaled = weight, difference = slope[i] - term[kShift][c];
                    if constexpr (Traits::kScaled) {
                        scaled = fmaf(weight, term[kAlpha][c], term[kBeta][c]);
                        difference = fmaf(slope[i], term[kAlpha][c], -term[kShift][c]);
                    }
                    of_values[c] = scaled;
                    of_keys[c] = weight * difference;
                }
                weights[0][columns / 2][columns % 2 * 2 + r] = pack<Number>(of_values[0], of_values[1]);
                weights[1][columns / 2][columns % 2 * 2 + r] = pack<Number>(of_keys[0], of_keys[1]);
            }
        }
    }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) affine_backward_kernel(
    const __grid_constant__ Arguments<typename Traits::Number> arguments) {
    using Number = typename Traits::Number;
    using Body = std::conditional_t<Traits::kOfKeys, Keys<Traits>, Queries<Traits>>;
    constexpr int kWidth = Traits::kWidth, kTile = Traits::kTile, kSums = Traits::kSums;
    extern __shared__ __align__(1024) uint4 memory[];
    const auto* const bytes = reinterpret_cast<const char*>(memory);
    const Places<Traits> places(memory);
    const Band& band = arguments.band;

    const int group = __shfl_sync(kWholeWarp, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (group == Traits::kGroups) {
        release_registers<Traits::kProducerRegisters>();
        if (threadIdx.x % 128 == 0) copy_tiles<Traits>(arguments, places);
        return;
    }
    claim_registers<Traits::kRegisters>();

    const auto start_rows = [&](float(&result)[kTile / 2], int step, int tensor) {
        start_tile_product<Number, kWidth, kTile>(result, places.own(tensor, group), Traits::kOwnPanel,
                                                  places.tile(step, tensor), Traits::kPanel);
    };
    const auto start_sum = [&](float(&sum)[kWidth / 2], const Weights<Traits>& weights, int step, int tensor) {
        start_weighted_sum<Number, kWidth, kTile>(sum, weights, places.tile(step, tensor), Traits::kPanel);
    };

    int step = 0, number = blockIdx.x;
#pragma unroll 1
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        const int top = span.first_row + 64 * group, row = span.first_row + threadIdx.x / 32 * 16 + lane / 4;
        const int reached_from = band.begin(top), reached_to = band.end(top + 63);  // by any row of the group
        const int all_from = band.begin(top + 63), all_to = band.end(top);          // by all of them
        float score[1][kTile / 2], slope[1][kTile / 2], sums[kSums][kWidth / 2] = {};
        Weights<Traits> weights[kSums];
        Body body(arguments, places, bytes, span, nth);

        for (int nth_head = 0; nth_head < span.heads; ++nth_head) {
#pragma unroll 1
            for (int tile = span.begin; tile < span.end; ++tile, ++step) {
                const int first = tile * kTile;
                places.pipeline.wait_full(step);
                if (first < reached_to && first + kTile > reached_from) {
                    const bool cut = first < all_from || first + kTile > all_to;
                    begin_products();
                    start_rows(score[0], step, 0);
                    start_rows(slope[0], step, 1);
                    wait_for_products<1>(score);
                    body.weigh(score, slope, weights, arguments, row, first, cut, step);
                    begin_products();
                    if constexpr (Traits::kOfKeys) start_sum(sums[0], weights[0], step, 1);
                    start_sum(sums[kSums - 1], weights[kSums - 1], step, 0);
                    wait_for_products<0>(sums);
                }
                places.pipeline.release(step);
            }
        }
        places.own_rows.release(group);

        body.finish(arguments, span, row, sums);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const Tensor<Number>& to = arguments.results[i];
            store_rows<Number, kWidth>(tiles_of(sums[i]), i == kSums - 1 ? arguments.scale : 1.0f, lane,
                                       band.num_rows - (row - lane / 4), to.row,
                                       to.at(span.batch, span.head) + (row - lane / 4) * to.row);
        }
        number = places.next.wait(nth);
    }
}

template <typename Number, int Width, bool Scaled, bool Exact>
void launch_both(const AffineBackward& call, cudaStream_t stream) {
    using OfQueries = Traits<Number, Width, 1, 128, Width == 64 ? 4 : 2, Scaled, Exact>;
    using OfKeys = Traits<Number, Width, 2, Width == 64 ? 128 : 64, 4, Scaled>;
    const int64_t group = call.heads / call.kv_heads;
    const Rows q{call.q, {call.batches, call.heads, call.num_queries, Width}, call.q_strides};
    const Rows k{call.k, {call.batches, call.kv_heads, call.num_keys, Width}, call.k_strides};
    const Rows v{call.v, k.sizes, call.v_strides}, grad_o{call.grad_o, q.sizes, call.grad_o_strides};
    const Sight sight{call.num_queries, call.num_keys, -1, call.right};
    Arguments<Number> arguments{};
    arguments.u = input_tensor<Number>(call.u, call.u_strides);
    arguments.lse = call.lse, arguments.alpha = call.alpha, arguments.beta = call.beta, arguments.sums = call.sums;
    arguments.m = call.m, arguments.dbeta = call.dbeta, arguments.terms = call.terms, arguments.counter = call.counters;
    arguments.heads = static_cast<int>(call.heads), arguments.group = static_cast<int>(group);
    arguments.padded_queries = static_cast<int>(whole_tiles(call.num_queries, kAffineTerms));
    arguments.terms_apart = call.batches * call.heads * arguments.padded_queries;
    arguments.scale = static_cast<float>(call.scale), arguments.factor = arguments.scale * kLog2E;

    NEARFAR_CHECK(cudaMemsetAsync(call.counters, 0, 2 * sizeof(int), stream));
    const auto between = [&](auto own_rows, auto other_rows, const Rows(&own)[2], const Rows(&others)[2]) {
        for (int i = 0; i < 2; ++i) {
            arguments.own[i] = own[i].template map<Number>(own_rows);
            arguments.others[i] = others[i].template map<Number>(other_rows);
        }
    };
    between(OfQueries::kRows / OfQueries::kGroups, OfQueries::kTile, {q, grad_o}, {k, v});
    arguments.results[0] = output_tensor<Number>(call.dq, call.dq_strides);
    arguments.band = sight.of_queries();
    arguments.spans =
        make_spans(call.num_queries, OfQueries::kRows, call.batches * call.heads, group, 4 * Width * call.num_keys);
    launch_spans<affine_backward_kernel<OfQueries>, OfQueries>(arguments, stream, "affine_backward launch, queries");
    between(OfKeys::kRows / OfKeys::kGroups, OfKeys::kTile, {k, v}, {q, grad_o});
    arguments.results[0] = output_tensor<Number>(call.dv, call.dv_strides);
    arguments.results[1] = output_tensor<Number>(call.dk, call.dk_strides);
    arguments.band = sight.of_keys();
    ++arguments.counter;
    arguments.spans =
        make_spans(call.num_keys, OfKeys::kRows, call.batches * call.kv_heads, 1, group * 4 * Width * call.num_queries);
    launch_spans<affine_backward_kernel<OfKeys>, OfKeys>(arguments, stream, "affine_backward launch, keys");
}

}  // namespace

void affine_backward(const AffineBackward& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, call.width, [&](auto* type, auto width) {
        using Number = std::remove_pointer_t<decltype(type)>;
        if (call.alpha != nullptr || call.beta != nullptr) launch_both<Number, width, true, true>(call, stream);
        else if (call.exact) launch_both<Number, width, false, true>(call, stream);
        else launch_both<Number, width, false, false>(call, stream);
    });
}

}  // namespace nearfar
