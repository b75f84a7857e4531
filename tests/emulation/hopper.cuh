// The instructions of csrc/common/hopper.cuh by plain C++ on emulated lanes, and the tensor maps that its copies take.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "block.h"
#include "panel.cuh"
#include "ptx.cuh"

// ------------------------------------------------------------------------------------------------------------- tensor maps

namespace emulation {

// What a CUtensorMap holds here, of the only kind that the kernels use.
struct TensorMap {
    const void* self;  // of the type: no other bits are a tensor map
    const char* data;
    uint64_t sizes[4], strides[3];  // in numbers, innermost first; in bytes
    uint32_t rows;                  // of a box of 64 columns
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
inline const char tensor_map_mark = 0;

inline CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* every,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
    bool sound = rank == 4 && (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) &&
                 reinterpret_cast<uintptr_t>(data) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                 swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && box[0] == 64 &&
                 box[2] == 1 && box[3] == 1;
    for (int i = 0; i < 4; ++i) sound = sound && sizes[i] - 1 < uint64_t{1} << 32 && box[i] - 1 < 256 && every[i] == 1;
    for (int i = 0; i < 3; ++i) sound = sound && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    if (!sound) return CUDA_ERROR_INVALID_VALUE;
    TensorMap held{&tensor_map_mark, static_cast<const char*>(data), {}, {}, box[1]};
    std::copy_n(sizes, 4, held.sizes);
    std::copy_n(strides, 3, held.strides);
    std::memcpy(map, &held, sizeof held);
    return CUDA_SUCCESS;
}

}  // namespace emulation

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
    *function = reinterpret_cast<void*>(&emulation::encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

namespace nearfar {

// ---------------------------------------------------------------------------------------------------------------- barriers

inline void init_barrier(uint32_t barrier, int arrivals) { emulation::init_barrier(barrier, arrivals); }

inline void publish_barriers() {
    for (auto& entry : emulation::block.barriers) entry.second.published = true;
}

inline void arrive(uint32_t barrier) { emulation::arrive(emulation::barrier_at(barrier), 0); }
inline void arrive_expecting(uint32_t barrier, int bytes) { emulation::arrive(emulation::barrier_at(barrier), bytes); }
inline void wait_for_barrier(uint32_t barrier, int parity) { emulation::wait_for(emulation::barrier_at(barrier), parity); }

// --------------------------------------------------------------------------------------------------------------- registers

// In all, threads may claim what they had at launch: as many as their number allows, a multiple of 8. One that would have to
// wait for others to release theirs has to have them here at once.
template <int Count>
void set_registers() {
    static_assert(Count % 8 == 0 && 24 <= Count && Count <= 256);
    __syncwarp();
    const auto threads = static_cast<unsigned>(emulation::block.lanes.size());
    emulation::block.registers += Count;
    if (emulation::block.registers > 65536 / threads / 8 * 8 * threads) emulation::fail("setmaxnreg: too many registers");
}
template <int Count>
void claim_registers() {
    set_registers<Count>();
}
template <int Count>
void release_registers() {
    set_registers<Count>();
}

// ------------------------------------------------------------------------------------------------------------------ copies

// The address of a byte of a panel: chunks of 16 bytes are permuted by the row of 128 bytes that they are in.
inline uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const CUtensorMap& tensor, int column, int row, int head, int batch, uint32_t barrier) {
    emulation::TensorMap map;
    std::memcpy(&map, &tensor, sizeof map);
    if (map.self != &emulation::tensor_map_mark) emulation::fail("copy_box: not a tensor map");
    const int bytes = 128 * static_cast<int>(map.rows);
    emulation::check_shared(to, "copy_box", 1024, bytes);
    emulation::start_copy(to, bytes, emulation::barrier_at(barrier), [=] {
        for (int i = 0; i < bytes; i += 2) {
            const int64_t at[] = {column + i % 128 / 2, row + i / 128, head, batch};
            int64_t from = 2 * at[0];
            bool inside = true;
            for (int d = 0; d < 4; ++d) inside = inside && 0 <= at[d] && at[d] < static_cast<int64_t>(map.sizes[d]);
            for (int d = 1; d < 4; ++d) from += at[d] * static_cast<int64_t>(map.strides[d - 1]);
            char* const number = emulation::shared.begin + permuted(to + i);
            if (inside) std::memcpy(number, map.data + from, 2);
            else std::memset(number, 0, 2);
        }
    });
}

inline void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    emulation::check_shared(to, "copy_bytes", 16, bytes);
    if (bytes % 16) emulation::fail("copy_bytes: bytes not a multiple of 16");
    if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("copy_bytes: global address not a multiple of 16");
    emulation::start_copy(to, bytes, emulation::barrier_at(barrier),
                          [=] { std::memcpy(emulation::shared.begin + to, from, bytes); });
}

// ---------------------------------------------------------------------------------------------------------------- products

// Where an operand of `rows` rows starts, by panel_operand.
inline uint32_t start_of(uint64_t operand, int rows) {
    if ((operand & ~uint64_t{0x3fff}) != (uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16))
        emulation::fail("wgmma: an operand of another layout");
    const auto start = static_cast<uint32_t>(operand & 0x3fff) << 4;
    if (start % 1024 >= 128) emulation::fail("wgmma: an operand that is no panel");
    emulation::check_shared(start, "wgmma", 32, 128 * rows - 96);
    return start;
}

// Numbers of one row of an operand.
template <typename T>
void load_row(float (&x)[16], uint32_t start, int row) {
    for (int i = 0; i < 8; ++i) {
        uint32_t word;
        std::memcpy(&word, emulation::shared.begin + permuted(start + 128 * row + 4 * i), sizeof word);
        x[2 * i] = half_of<T>(word, 0), x[2 * i + 1] = half_of<T>(word, 1);
    }
}

template <typename T, int N>
void start_product(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
    emulation::Lane& lane = emulation::this_lane();
    if (!lane.may_multiply) emulation::fail("wgmma: begin_products is missing");
    struct Operands {
        uint64_t a, b;
        bool add;
    };
    emulation::exchange<char>(Operands{a, b, add}, [](const Operands(&in)[32], char(&)[32]) {
        for (const Operands& other : in)
            if (other.a != in[0].a || other.b != in[0].b || other.add != in[0].add) emulation::fail("wgmma: lanes disagree");
    });
    const uint32_t left = start_of(a, 64), right = start_of(b, N);
    const auto compute = [&c, left, right, add] {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        float x[2][16], y[16];
        for (int r = 0; r < 2; ++r) load_row<T>(x[r], left, 16 * warp + lane / 4 + 8 * r);
        for (int column = 0; column < N / 4; ++column) {
            load_row<T>(y, right, column / 2 * 8 + 2 * (lane % 4) + column % 2);
            for (int r = 0; r < 2; ++r) {
                float& number = c[column / 2 * 4 + 2 * r + column % 2];
                double sum = add ? number : 0;
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[r][k]) * y[k];
                number = static_cast<float>(sum);
            }
        }
    };
    if (emulation::late_copies) return compute();
    lane.products.push_back({c, {c, c + N / 2}, compute});
    std::fill_n(c, N / 2, NAN);
}

// 16 rows by rows_operand.
struct InnerRows {
    uint32_t start, stride;

    InnerRows(uint64_t operand, int columns)
        : start(static_cast<uint32_t>(operand & 0x3fff) << 4), stride(static_cast<uint32_t>(operand >> 16 & 0x3fff) << 4) {
        if ((operand & ~uint64_t{0x3fff3fff}) != (uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32))
            emulation::fail("wgmma: an operand of another layout");
        if (start % 1024 || stride % 1024) emulation::fail("wgmma: an operand that is no panel");
        emulation::check_shared(start + (columns / 64 - 1) * stride, "wgmma", 1024, 2048);
    }
    template <typename T>
    float at(int k, int column) const;
};

template <typename T>
float InnerRows::at(int k, int column) const {
    const uint32_t address = permuted(start + column / 64 * stride + 128 * k + column % 64 / 2 * 4);
    uint32_t word;
    std::memcpy(&word, emulation::shared.begin + address, sizeof word);
    return half_of<T>(word, column % 2);
}

template <typename T, int N>
void start_product_of_rows(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    emulation::Lane& lane = emulation::this_lane();
    if (!lane.may_multiply) emulation::fail("wgmma: begin_products is missing");
    const InnerRows inner(b, N);
    struct In {
        uint32_t a[4];
        uint64_t b;
    };
    struct Rows {
        uint32_t word[2][8];  // of the two rows of this lane
    };
    const Rows rows = emulation::exchange<Rows>(In{{a[0], a[1], a[2], a[3]}, b}, [](const In(&in)[32], Rows(&out)[32]) {
        for (const In& other : in)
            if (other.b != in[0].b) emulation::fail("wgmma: lanes disagree");
        for (int i = 0; i < 16 * 32; ++i) {
            const int lane = i / 16, pair = i / 2 % 4, half = i / 8 % 2, row = i % 2;
            out[lane].word[row][half * 4 + pair] = in[lane / 4 * 4 + pair].a[half * 2 + row];
        }
    });
    const auto compute = [&c, rows, inner] {
        const int lane = threadIdx.x % 32;
        for (int column = 0; column < N / 4; ++column) {
            for (int r = 0; r < 2; ++r) {
                float& number = c[column / 2 * 4 + 2 * r + column % 2];
                double sum = number;
                for (int k = 0; k < 16; ++k)
                    sum += static_cast<double>(half_of<T>(rows.word[r][k / 2], k % 2)) *
                           inner.at<T>(k, column / 2 * 8 + 2 * (lane % 4) + column % 2);
                number = static_cast<float>(sum);
            }
        }
    };
    if (emulation::late_copies) return compute();
    lane.products.push_back({c, {c, c + N / 2}, compute});
    std::fill_n(c, N / 2, NAN);
}

inline void publish_to_products() {}

inline void begin_products() {
    __syncwarp();
    emulation::this_lane().may_multiply = true;
}

inline void commit_products() {
    __syncwarp();
    emulation::Lane& lane = emulation::this_lane();
    std::vector<size_t>& groups = lane.product_groups;
    groups.push_back(lane.products.size() - std::accumulate(groups.begin(), groups.end(), size_t{0}));
}

template <int Pending, int Count, int Numbers>
void wait_for_products(float (&c)[Count][Numbers]) {
    __syncwarp();
    emulation::Lane& lane = emulation::this_lane();
    lane.may_multiply = false;
    while (lane.product_groups.size() > Pending) {
        const auto begin = lane.products.begin(), end = begin + lane.product_groups.front();
        for (auto product = end; product != begin;) {  // back to what c was before the first of them
            --product;
            if (product->c < c[0] || product->c >= c[0] + Count * Numbers)
                emulation::fail("wgmma: waited for by other results");
            std::copy(product->before.begin(), product->before.end(), product->c);
        }
        for (auto product = begin; product != end; ++product) product->compute();
        lane.products.erase(begin, end);
        lane.product_groups.erase(lane.product_groups.begin());
    }
}

}  // namespace nearfar
