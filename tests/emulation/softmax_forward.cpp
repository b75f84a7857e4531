#include "device.h"
#include "softmax_forward.cu"

EMULATED softmax_forward(const nearfar::SoftmaxForward* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::softmax_forward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
