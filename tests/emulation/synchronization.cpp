#include "device.h"
#include "synchronization/synchronization.cu"

EMULATED synchronization_forward(const nearfar::SynchronizationForward* call, const char* dtype, int device, bool late_copies,
                                 unsigned seed) {
    const auto launch = [&] { nearfar::synchronization_forward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED synchronization_backward(const nearfar::SynchronizationBackward* call, const char* dtype, int device,
                                  bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::synchronization_backward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
