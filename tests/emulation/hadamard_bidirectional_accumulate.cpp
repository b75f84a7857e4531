#include "device.h"
#include "hadamard/bidirectional_accumulate.cu"

EMULATED hadamard_bidirectional_accumulate(const nearfar::HadamardBidirectionalAccumulate* call, const char*, int device, bool late_copies,
                             unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_bidirectional_accumulate(*call, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
