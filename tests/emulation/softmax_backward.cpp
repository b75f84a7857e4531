#include "device.h"
#include "softmax_backward.cu"

EMULATED softmax_backward(const nearfar::SoftmaxBackward* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::softmax_backward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
