#include "device.h"
#include "linear/causal_forward.cu"

EMULATED linear_causal_forward(const nearfar::LinearCausalForward* call, const char* feature_map, int device, bool late_copies,
                        unsigned seed) {
    const auto launch = [&] { nearfar::linear_causal_forward(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
