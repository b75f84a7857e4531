// A (B, H, N, D) tensor in global memory, its rows contiguous.
#pragma once

#include <array>
#include <cstdint>

namespace nearfar {

template <typename T>
struct Tensor {
    T* data;
    int64_t batch, head, row;  // strides

    __device__ T* at(int b, int h) const { return data + b * batch + h * head; }
};

template <typename T>
Tensor<const T> input_tensor(const void* data, const std::array<int64_t, 3>& strides) {
    return {static_cast<const T*>(data), strides[0], strides[1], strides[2]};
}

template <typename T>
Tensor<T> output_tensor(void* data, const std::array<int64_t, 3>& strides) {
    return {static_cast<T*>(data), strides[0], strides[1], strides[2]};
}

}  // namespace nearfar
