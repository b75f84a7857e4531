#include "device.h"
#include "hadamard_backward.cu"

EMULATED hadamard_grad_queries(const nearfar::HadamardGradQueries* call, const char* feature_map, int device, bool late_copies,
                               unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_grad_queries(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED hadamard_grad_keys(const nearfar::HadamardGradKeys* call, const char* feature_map, int device, bool late_copies,
                            unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_grad_keys(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
