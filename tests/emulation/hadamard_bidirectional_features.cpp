#include "device.h"
#include "hadamard/bidirectional_features.cu"

EMULATED hadamard_bidirectional_features(const nearfar::HadamardBidirectionalFeatures* call, const char* feature_map, int device, bool late_copies,
                           unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_bidirectional_features(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
