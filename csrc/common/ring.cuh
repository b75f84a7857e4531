// A ring of slots in shared memory that one warp fills and others read: step s uses slot s % kStages.
//
// Who fills a slot arrives with the bytes of the copies that it is about to start and, where it writes some itself, once more
// when it has.
#pragma once

#include <cstdint>

#include "hopper.cuh"

namespace nearfar {

template <int kStages>
struct Ring {
    static constexpr int kBytes = 8 * 2 * kStages;
    uint32_t barriers;  // the address of that many bytes, a multiple of 8

    __device__ uint32_t full(int step) const { return barriers + 8 * (step % kStages); }
    __device__ uint32_t empty(int step) const { return barriers + 8 * (kStages + step % kStages); }

    // By one thread, ahead of publish_barriers.
    __device__ void make(int reading_warps, int arrivals = 1) const {
        for (int slot = 0; slot < kStages; ++slot) {
            make_barrier(full(slot), arrivals);
            make_barrier(empty(slot), reading_warps);
        }
    }

    // All have read what the slot of this step had before; or what it is to have has come.
    __device__ void wait_empty(int step) const {
        if (step >= kStages) wait_for_barrier(empty(step), (step / kStages - 1) % 2);
    }
    // What the slot of this step has was read by all, and nothing was put there since.
    __device__ void wait_left(int step) const { wait_for_barrier(empty(step), step / kStages % 2); }
    __device__ void wait_full(int step) const { wait_for_barrier(full(step), step / kStages % 2); }

    // By all lanes of a reading warp.
    __device__ void leave(int step) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(empty(step));
    }
};

}  // namespace nearfar
