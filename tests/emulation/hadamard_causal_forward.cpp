#include "device.h"
#include "hadamard/causal_forward.cu"

EMULATED hadamard_causal_forward(const nearfar::HadamardCausalForward* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_causal_forward(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
