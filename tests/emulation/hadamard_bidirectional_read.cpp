#include "device.h"
#include "hadamard/bidirectional_read.cu"

EMULATED hadamard_bidirectional_read(const nearfar::HadamardBidirectionalRead* call, const char* feature_map, int device, bool late_copies,
                       unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_bidirectional_read(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
