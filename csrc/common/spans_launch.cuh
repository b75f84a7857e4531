// Launches of kernels whose blocks take spans of rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "check.h"
#include "occupancy.h"
#include "spans.cuh"

namespace nearfar {

// rows: of each of `heads` heads. unit: heads that share the same other side (a group of query heads), whose data has `bytes`.
inline Spans make_spans(int64_t rows, int rows_at_once, int64_t heads, int64_t unit, int64_t bytes) {
    constexpr int64_t kShared = 1 << 24;  // bytes shared by the heads that run together, a third of an H100's L2
    const int64_t together = unit * std::max<int64_t>(1, kShared / std::max<int64_t>(1, bytes));
    return {static_cast<int>((rows + rows_at_once - 1) / rows_at_once), static_cast<int>(std::min(heads, together)),
            static_cast<int>(heads)};
}

template <auto kKernel, typename Traits, typename Arguments>
void launch_spans(Arguments& arguments, cudaStream_t stream, const char* name) {
    const int resident = resident_blocks<kKernel>(Traits::kThreads, Traits::kBytes);
    const int64_t spans = static_cast<int64_t>(arguments.spans.tiles) * arguments.spans.heads;
    void* parameters[] = {&arguments};
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(resident, spans));
    check(cudaLaunchKernel(kKernel, dim3(blocks), dim3(Traits::kThreads), parameters, Traits::kBytes, stream), name);
}

}  // namespace nearfar
