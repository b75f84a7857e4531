// Copies from global to shared memory that run on while the thread computes (sm_80 on).
#pragma once

#include <cstdint>

namespace nearfar {

// The address that ldmatrix and cp.async take for something in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes, past the first-level cache. Without `wanted` it writes zeros and reads nothing.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(wanted ? 16 : 0)
                 : "memory");
}

// Waits for all copies that this thread started. Those of other threads are visible after a barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Closes a group of this thread's copies, and waits until at most `Running` of its latest groups are under way.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Running>
__device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Running) : "memory");
}

}  // namespace nearfar
