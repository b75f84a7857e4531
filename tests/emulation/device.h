// The part of CUDA C++ that the kernels use, for g++ and the emulation in block.h. Included ahead of a kernel's source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "block.h"
#include "common/arguments.h"

#undef __forceinline__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // all lanes have the same thread; it is static within functions, and may be extern

// The dynamic shared memory that kernels declare within their functions, as extern __shared__ uint4 memory[].
namespace nearfar {
namespace {
alignas(1024) thread_local uint4 memory[(emulation::kSharedBytes + emulation::kGuardBytes) / sizeof(uint4)];
}
}  // namespace nearfar

using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------------ all lanes at once

inline void __syncthreads() { emulation::barrier(); }

inline void __syncwarp() {
    emulation::exchange<char>('\0', [](const char (&)[32], char (&)[32]) {});
}

// Groups of `width` lanes, each lane reads that of lane `source` in its group.
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
    struct In {
        T value;
        int source, width;
    };
    return emulation::exchange<T>(In{value, source, width}, [](const In(&in)[32], T(&out)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
            const int mask = in[lane].width - 1;
            out[lane] = in[(lane & ~mask) | (in[lane].source & mask)].value;
        }
    });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}

inline unsigned __ballot_sync(unsigned, bool mine) {
    return emulation::exchange<unsigned>(mine, [](const bool(&in)[32], unsigned(&out)[32]) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(in[lane]) << lane;
        std::fill_n(out, 32, bits);
    });
}
inline bool __any_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) != 0; }
inline bool __all_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) == ~0u; }

inline int __reduce_min_sync(unsigned, int mine) {
    return emulation::exchange<int>(
        mine, [](const int(&in)[32], int(&out)[32]) { std::fill_n(out, 32, *std::min_element(in, in + 32)); });
}
inline int __reduce_max_sync(unsigned, int mine) {
    return emulation::exchange<int>(
        mine, [](const int(&in)[32], int(&out)[32]) { std::fill_n(out, 32, *std::max_element(in, in + 32)); });
}

// ----------------------------------------------------------------------------------------------------------------- one lane

inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }  // lanes take turns
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, unsigned shift) {
    return static_cast<uint32_t>(((uint64_t{high} << 32 | low) << shift % 32) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift % 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = uint64_t{y} << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

#define __log2f log2f  // glibc declares a function of that name

// Sums of two floats, rounded down and up: long double is exact enough to tell on which side the nearest float lies.
inline float __fadd_rd(float x, float y) {
    const long double sum = static_cast<long double>(x) + y;
    const float nearest = static_cast<float>(sum);
    return nearest > sum ? nextafterf(nearest, -INFINITY) : nearest;
}
inline float __fadd_ru(float x, float y) { return -__fadd_rd(-x, -y); }

inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
    const auto fma = [](__half a, __half b, __half c) {
        return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
    };
    return {fma(x.x, y.x, z.x), fma(x.y, y.y, z.y)};
}

// -------------------------------------------------------------------------------------------------------------- the runtime

namespace emulation {

inline int device;  // device i has i + 1 multiprocessors of one block each

template <typename... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<Parameters*>(arguments[I])...);
}

}  // namespace emulation

extern "C" {
cudaError_t cudaGetDevice(int* device) {
    *device = emulation::device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {  // the number of multiprocessors is asked
    *value = device + 1;
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(cudaError_t) { return "more shared memory than a block may have"; }
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, void** arguments, size_t bytes,
                             cudaStream_t) {
    if (bytes > emulation::kSharedBytes) return cudaErrorInvalidValue;
    const std::function<void()> body = [&] { emulation::call(kernel, arguments, std::index_sequence_for<Parameters...>()); };
    emulation::block.body = &body;
    emulation::shared = {reinterpret_cast<char*>(nearfar::memory), sizeof nearfar::memory, bytes};
    gridDim.x = grid.x;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) emulation::run_block(threads.x);
    return cudaSuccess;
}

namespace emulation {

// Calls a launcher; what it throws is the result, null if all went well.
template <typename Launcher>
const char* run(const Launcher& launcher, int device, bool late_copies, unsigned seed) {
    static std::string error;
    emulation::device = device;
    emulation::late_copies = late_copies;
    random_source.seed(seed);
    try {
        launcher();
        return nullptr;
    } catch (const std::exception& exception) {
        return (error = exception.what()).c_str();
    }
}

template <typename Call, typename Variant>
void launch(void (*launcher)(const Call&, Variant, cudaStream_t), const void* call, const char* variant) {
    launcher(*static_cast<const Call*>(call), nearfar::parse_variant<std::decay_t<Variant>>(variant), nullptr);
}
template <typename Call>
void launch(void (*launcher)(const Call&, cudaStream_t), const void* call, const char*) {
    launcher(*static_cast<const Call*>(call), nullptr);
}

// The members of a launcher's arguments, each as "name kind offset size", a line each.
template <typename Call, typename... Others>
std::string describe(void (*)(const Call&, Others...)) {
    std::string text;
    for (const auto& argument : Call{}.arguments())
        text += argument.name + ' ' + static_cast<char>(argument.kind) + ' ' + std::to_string(argument.offset) + ' ' +
                std::to_string(argument.size) + '\n';
    return text;
}

}  // namespace emulation

#define EXPORTED extern "C" __attribute__((visibility("default"))) const char*

// Lets Python call a launcher and learn its arguments: functions `name` and `name_arguments`.
#define EMULATED(name)                                                                                         \
    EXPORTED name(const void* call, const char* variant, int device, bool late_copies, unsigned seed) {        \
        const auto launcher = [&] { emulation::launch(&nearfar::name, call, variant); };                       \
        return emulation::run(launcher, device, late_copies, seed);                                            \
    }                                                                                                          \
    EXPORTED name##_arguments() {                                                                              \
        static const std::string text = emulation::describe(&nearfar::name);                                   \
        return text.c_str();                                                                                   \
    }
