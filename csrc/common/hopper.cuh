// Instructions of sm_90a: products of 64 rows by a warp group of four warps, from tiles in shared memory, which run on while
// the group computes; copies of tiles by the tensor memory accelerator; and the barriers that both are waited for with.
// Machine code for other architectures traps: callers ask for the architecture first. tests/emulation replaces this file.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "panel.cuh"
#include "ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NEARFAR_HOPPER(...) __VA_ARGS__
#else
#define NEARFAR_HOPPER(...) __trap()
#endif

namespace nearfar {

// ---- barriers in shared memory, which count arrivals and bytes

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    NEARFAR_HOPPER(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"));
}

// After they were made, and before a barrier of all threads.
__device__ __forceinline__ void publish_barriers() {
    NEARFAR_HOPPER(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"));
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    NEARFAR_HOPPER(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
}

// Arrives, and lets the barrier wait for this many bytes of copies, too.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
    NEARFAR_HOPPER(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                                : "memory"));
}

// Waits for the end of a phase: the first one, third one, .. have parity 0.
__device__ __forceinline__ void wait_for_barrier(uint32_t barrier, int parity) {
    NEARFAR_HOPPER(asm volatile("{\n\t"
                                ".reg .pred p;\n\t"
                                "again:\n\t"
                                "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
                                "@!p bra again;\n\t"
                                "}" ::"r"(barrier), "r"(parity)
                                : "memory"));
}

// ---- registers

// Sets the registers of each thread of this warp group from here on: more than at launch, after other groups released
// theirs, or fewer.
template <int Count>
__device__ __forceinline__ void claim_registers() {
    NEARFAR_HOPPER(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count)));
}
template <int Count>
__device__ __forceinline__ void release_registers() {
    NEARFAR_HOPPER(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count)));
}

// ---- copies, which a barrier counts the bytes of

// A box of a (B, H, N, D) tensor: 64 columns from `column`, rows from `row` on; what is outside becomes zero.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& tensor, int column, int row, int head, int batch,
                                         uint32_t barrier) {
    NEARFAR_HOPPER(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                                "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(&tensor), "r"(column), "r"(row), "r"(head),
                                "r"(batch), "r"(barrier)
                                : "memory"));
}

// Bytes from a multiple of 16, as many as a multiple of 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    NEARFAR_HOPPER(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                                "[%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                                : "memory"));
}

// ---- products

#define NEARFAR_8(i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define NEARFAR_32(i) NEARFAR_8(i), NEARFAR_8(i + 8), NEARFAR_8(i + 16), NEARFAR_8(i + 24)
#define NEARFAR_NAMES_32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NEARFAR_NAMES_64                                                                                                     \
    NEARFAR_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
                     "%57,%58,%59,%60,%61,%62,%63"
#define NEARFAR_ARGUMENTS(...) __VA_ARGS__
// One instruction for each number of columns and type: the text before the results and after them, which names the operands and
// the predicate p; the number of the flag that becomes p.
#define NEARFAR_PRODUCT(SHAPE, TYPES, NAMES, OPERANDS, ADD, RESULTS, ...)                                    \
    NEARFAR_HOPPER(asm volatile("{\n\t"                                                                      \
                                ".reg .pred p;\n\t"                                                          \
                                "setp.ne.b32 p, %" ADD ", 0;\n\t"                                            \
                                "wgmma.mma_async.sync.aligned." SHAPE "k16.f32." TYPES " {" NAMES "}, " OPERANDS ";\n\t" \
                                "}"                                                                          \
                                : RESULTS                                                                    \
                                : __VA_ARGS__, "r"(static_cast<int>(add))))

// c = a b^T, or c += a b^T, for 16 columns of 64 rows of a and of N rows of b, both by panel_operand. A warp has 16 of the rows
// of c, as fragments c of mma.cuh one after the other. Starts it: c may not be touched before it was waited for.
template <typename T, int N>
__device__ __forceinline__ void start_product(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit numbers only");
    static_assert(N == 64 || N == 128, "the shapes written out here");
#define NEARFAR_PRODUCTS(TYPES)                                                                                             \
    if constexpr (N == 64)                                                                                                  \
        NEARFAR_PRODUCT("m64n64", TYPES, NEARFAR_NAMES_32, "%32, %33, p, 1, 1, 0, 0", "34", NEARFAR_ARGUMENTS(NEARFAR_32(0)), \
                        "l"(a), "l"(b));                                                                                    \
    else                                                                                                                    \
        NEARFAR_PRODUCT("m64n128", TYPES, NEARFAR_NAMES_64, "%64, %65, p, 1, 1, 0, 0", "66",                                 \
                        NEARFAR_ARGUMENTS(NEARFAR_32(0), NEARFAR_32(32)), "l"(a), "l"(b))
    if constexpr (std::is_same_v<T, __half>) { NEARFAR_PRODUCTS("f16.f16"); }
    else { NEARFAR_PRODUCTS("bf16.bf16"); }
#undef NEARFAR_PRODUCTS
}

// c += a b for 16 columns of 64 rows of a, each warp's 16 rows as a fragment a of mma.cuh, and 16 rows of N columns of b, by
// rows_operand. Starts it: neither c nor a may be touched before it was waited for.
template <typename T, int N>
__device__ __forceinline__ void start_product_of_rows(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit numbers only");
    static_assert(N == 64 || N == 128, "the shapes written out here");
    [[maybe_unused]] constexpr bool add = true;
#define NEARFAR_PRODUCTS(TYPES)                                                                                             \
    if constexpr (N == 64)                                                                                                  \
        NEARFAR_PRODUCT("m64n64", TYPES, NEARFAR_NAMES_32, "{%32, %33, %34, %35}, %36, p, 1, 1, 1", "37",                     \
                        NEARFAR_ARGUMENTS(NEARFAR_32(0)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));              \
    else                                                                                                                    \
        NEARFAR_PRODUCT("m64n128", TYPES, NEARFAR_NAMES_64, "{%64, %65, %66, %67}, %68, p, 1, 1, 1", "69",                    \
                        NEARFAR_ARGUMENTS(NEARFAR_32(0), NEARFAR_32(32)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, __half>) { NEARFAR_PRODUCTS("f16.f16"); }
    else { NEARFAR_PRODUCTS("bf16.bf16"); }
#undef NEARFAR_PRODUCTS
}
#undef NEARFAR_ARGUMENTS
#undef NEARFAR_PRODUCT
#undef NEARFAR_NAMES_64
#undef NEARFAR_NAMES_32
#undef NEARFAR_32
#undef NEARFAR_8

// By every thread that wrote operands to shared memory otherwise than by copy_box, ahead of a barrier.
__device__ __forceinline__ void publish_to_products() {
    NEARFAR_HOPPER(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}

// Before the first product of a group of them, after anything else has written their results.
__device__ __forceinline__ void begin_products() { NEARFAR_HOPPER(asm volatile("wgmma.fence.sync.aligned;" ::: "memory")); }

__device__ __forceinline__ void commit_products() {
    NEARFAR_HOPPER(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"));
}

// Waits for all groups of products except the last `Pending`; c are results of the completed ones.
template <int Pending, int Count, int Numbers>
__device__ __forceinline__ void wait_for_products(float (&c)[Count][Numbers]) {
    NEARFAR_HOPPER(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"));
    // They are not read before.
#pragma unroll
    for (int i = 0; i < Numbers * Count; ++i) asm volatile("" : "+f"(c[i / Numbers][i % Numbers])::"memory");
}

}  // namespace nearfar
