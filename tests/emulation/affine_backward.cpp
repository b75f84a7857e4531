#include "device.h"
#include "affine/backward.cu"

EMULATED affine_backward(const nearfar::AffineBackward* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::affine_backward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
