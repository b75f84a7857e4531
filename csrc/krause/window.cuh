// Which keys a query reaches: a window of positions, cut at the ends of the keys or of its packed sequence.
#pragma once

#include <cstdint>

namespace nearfar {

struct Window {
    int offset;  // position of query 0 among the keys: the queries are the last positions
    int back, ahead;
    const int32_t* token_bounds;  // first positions, then ends, of each token's sequence; null: one sequence
    int num_queries, num_keys;

    __device__ int size() const { return back + ahead + 1; }
};

struct Reach {
    int begin, end;  // half open; begin >= end where there is no key

    __device__ int count() const { return end > begin ? end - begin : 0; }
};

// The keys that query `row` reaches; none for a row beyond the last.
__device__ __forceinline__ Reach reach(const Window& window, int row) {
    if (row >= window.num_queries) return {0, 0};
    int start = 0, stop = window.num_keys;
    if (window.token_bounds != nullptr) {
        start = window.token_bounds[row];
        stop = window.token_bounds[window.num_queries + row];
    }
    const int position = row + window.offset;
    return {max(start, position - window.back), min(stop, position + window.ahead + 1)};
}

}  // namespace nearfar
