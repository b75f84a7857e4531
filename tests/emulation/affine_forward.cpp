#include "device.h"
#include "affine/forward.cu"

EMULATED affine_forward(const nearfar::AffineForward* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::affine_forward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
