// A pipeline in shared memory that one warp fills and others read: step s uses stage s % kStages.
//
// Who fills a stage arrives with the bytes of the copies that it is about to start and, where it writes some itself, once more
// when it has.
#pragma once

#include <cstdint>

#include "hopper.cuh"

namespace nearfar {

template <int kStages>
struct Pipeline {
    static constexpr int kBytes = 8 * 2 * kStages;
    uint32_t barriers;  // the address of that many bytes, a multiple of 8

    __device__ uint32_t full(int step) const { return barriers + 8 * (step % kStages); }
    __device__ uint32_t empty(int step) const { return barriers + 8 * (kStages + step % kStages); }

    // By one thread, ahead of publish_barriers.
    __device__ void init(int reading_warps, int arrivals = 1) const {
        for (int stage = 0; stage < kStages; ++stage) {
            init_barrier(full(stage), arrivals);
            init_barrier(empty(stage), reading_warps);
        }
    }

    // All have read what the stage of this step held before; or what it is to hold has arrived.
    __device__ void wait_empty(int step) const {
        if (step >= kStages) wait_for_barrier(empty(step), (step / kStages - 1) % 2);
    }
    // What the stage of this step holds was read by all, and nothing was put there since.
    __device__ void wait_consumed(int step) const { wait_for_barrier(empty(step), step / kStages % 2); }
    __device__ void wait_full(int step) const { wait_for_barrier(full(step), step / kStages % 2); }

    // By all lanes of a reading warp.
    __device__ void release(int step) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(empty(step));
    }
};

}  // namespace nearfar
