// Number of blocks of a kernel that are resident on a device.
#pragma once

#include <algorithm>
#include <array>

#include "check.h"

namespace nearfar {

// Of the current device, which is asked once; from then on the kernel may have `bytes` of dynamic shared memory there.
template <auto kKernel>
int resident_blocks(int threads, int bytes) {
    static std::array<int, 64> known{};
    int device = 0;
    NEARFAR_CHECK(cudaGetDevice(&device));
    int& resident = known.at(device);
    if (resident == 0) {
        int blocks = 0, multiprocessors = 0;
        NEARFAR_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        NEARFAR_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, bytes));
        NEARFAR_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
        resident = std::max(1, blocks * multiprocessors);
    }
    return resident;
}

}  // namespace nearfar
