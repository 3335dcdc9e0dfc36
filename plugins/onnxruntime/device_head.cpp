#include "device_head.h"

#include <string>
#include <vector>

namespace vq::ort {
namespace {

DeviceHead::Memory OnDevice(const void* host, size_t bytes) {
    void* memory = nullptr;
    Check(cudaMalloc(&memory, bytes), "allocating the head's constants on the GPU");
    DeviceHead::Memory owned(memory);
    Check(cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice), "copying the head's constants to the GPU");
    return owned;
}

}  // namespace

void Check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    throw Ort::Exception(std::string(doing) + " failed: " + cudaGetErrorString(status), ORT_FAIL);
}

// A failure here leaves nothing to do: the context is gone or going.
void DeviceHead::CudaFree::operator()(void* memory) const noexcept { (void)cudaFree(memory); }

DeviceHead::DeviceHead(const OrtKernelInfo* info)
    : constants(info), code_bits(CodeBits(int64_t{constants.max_code()} + 1)) {
    const int64_t v_count = constants.vocab_size(), m_count = constants.num_codebooks();
    std::vector<uint32_t> words(static_cast<size_t>(m_count * WordsPerCodebook(v_count, code_bits)));
    PackCodes(constants.codes(), v_count, m_count, code_bits, words.data());
    codes = OnDevice(words.data(), words.size() * sizeof(uint32_t));
    if (constants.bias() != nullptr) {
        bias = OnDevice(constants.bias(), static_cast<size_t>(v_count * SizeOf(constants.type())));
    }
}

}  // namespace vq::ort
