// Spans of rows. The persistent blocks of a launch take one after the other, whenever they are free.
//
// So prologue and epilogue of one span overlap the products of another, and copies for the next span start early. Which block
// takes which span changes no result.
#pragma once

#include <cstdint>

#include "hopper.cuh"

namespace nearfar {

// Spans are tiles of rows of one head. They are numbered so that `together` heads run at the same time and share L2.
struct Spans {
    int tiles, together, heads;  // of a head, heads in all

    __device__ int count() const { return tiles * heads; }
    __device__ void locate(int number, int& head, int& tile) const {
        const int size = together * tiles, first = number / size * together, side_by_side = min(together, heads - first);
        head = first + number % size % side_by_side, tile = number % size / side_by_side;
    }
};

// One thread passes the number of the next span to its block, while the block works on the nth one. It may do so after all
// threads have finished the span before: there are two slots with barriers, used in turn.
struct NextSpan {
    static constexpr int kBytes = 2 * (8 + 4);
    uint32_t barriers;
    int* numbers;

    __device__ NextSpan(void* memory, int offset)
        : barriers(shared_address(memory) + offset), numbers(reinterpret_cast<int*>(static_cast<char*>(memory) + offset) + 4) {}
    __device__ uint32_t barrier(int nth) const { return barriers + 8 * (nth % 2); }
    __device__ void init() const {
        init_barrier(barrier(0), 1);
        init_barrier(barrier(1), 1);
    }
    // counter: in global memory, of the spans that were taken beside the first of each block; 0 at launch.
    __device__ int take(int nth, int* counter) const {
        const int number = static_cast<int>(gridDim.x) + atomicAdd(counter, 1);
        numbers[nth % 2] = number;
        arrive(barrier(nth));
        return number;
    }
    __device__ int wait(int nth) const {
        wait_for_barrier(barrier(nth), nth / 2 % 2);
        return numbers[nth % 2];
    }
};

// Rows of each of a block's groups. They are copied when the group is done with the rows of the previous span.
template <int kGroups>
struct OwnRows {
    static constexpr int kBytes = 8 * 2 * kGroups;
    uint32_t barriers;

    __device__ uint32_t full(int group) const { return barriers + 8 * group; }
    __device__ uint32_t empty(int group) const { return barriers + 8 * (kGroups + group); }
    __device__ void init() const {
        for (int group = 0; group < kGroups; ++group) {
            init_barrier(full(group), 1);
            init_barrier(empty(group), 4);
        }
    }
    // Of the nth span of a block.
    __device__ void wait_empty(int group, int nth) const {
        if (nth > 0) wait_for_barrier(empty(group), (nth - 1) % 2);
    }
    __device__ void wait_full(int group, int nth) const { wait_for_barrier(full(group), nth % 2); }
    __device__ void release(int group) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(empty(group));
    }
};

}  // namespace nearfar
