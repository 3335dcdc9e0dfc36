// Device memory for the tests that run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "check.h"

namespace device_bytes {

inline bool Ok(cudaError_t status, const char* what) {
    CHECK(status == cudaSuccess, << what << ": " << cudaGetErrorString(status));
    return status == cudaSuccess;
}

// Device memory with a copy of host bytes; empty stays null.
class DeviceBytes {
public:
    DeviceBytes(const void* bytes, size_t count) : count_(count) {
        if (count == 0 || !Ok(cudaMalloc(&data_, count), "cudaMalloc")) return;
        Ok(cudaMemcpy(data_, bytes, count, cudaMemcpyHostToDevice), "copy to the device");
    }
    ~DeviceBytes() { cudaFree(data_); }
    DeviceBytes(const DeviceBytes&) = delete;
    DeviceBytes& operator=(const DeviceBytes&) = delete;

    unsigned char* data() const { return static_cast<unsigned char*>(data_); }
    void Read(void* bytes) const {
        Ok(cudaMemcpy(bytes, data_, count_, cudaMemcpyDeviceToHost), "copy from the device");
    }

private:
    void* data_ = nullptr;
    size_t count_;
};

}  // namespace device_bytes
