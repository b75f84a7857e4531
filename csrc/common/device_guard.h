// Makes a device current for a scope and restores the caller's, whose choice PyTorch's runtime shares.
#pragma once

#include "check.h"

namespace nearfar {

class DeviceGuard {
   public:
    explicit DeviceGuard(int device) : device_(device) {
        NEARFAR_CHECK(cudaGetDevice(&previous_));
        if (previous_ != device_) NEARFAR_CHECK(cudaSetDevice(device_));
    }
    ~DeviceGuard() {
        if (previous_ != device_) cudaSetDevice(previous_);  // It was current before, and a destructor must not throw.
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int device_;
    int previous_ = 0;
};

}  // namespace nearfar
