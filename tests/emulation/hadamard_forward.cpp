#include "device.h"
#include "hadamard_forward.cu"

EMULATED hadamard_forward(const nearfar::HadamardForward* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_forward(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
