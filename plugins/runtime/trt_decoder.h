// A decoder plan in TensorRT: one sequence, its KV cache kept on the GPU in two buffers that take turns.
//
// Names and shapes are read from the engine: input_ids, attention_mask, position_ids int64 [1, S] where it has them,
// past_key_values.* [1, heads, P, head_dim] -> present.*; the answer is in `ids` int64 [1, S, k], of --output topk.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"

namespace vq {

#define VQ_STRING_OF(number) #number
#define VQ_STRING(number) VQ_STRING_OF(number)
inline constexpr char kTensorRtLibrary[] = "libnvinfer.so." VQ_STRING(NV_TENSORRT_MAJOR);

// Bytes on the GPU.
class DeviceBuffer {
public:
    explicit DeviceBuffer(size_t size);
    ~DeviceBuffer() { cudaFree(data_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    void* data() const { return data_; }

private:
    void* data_ = nullptr;
};

class TrtDecoder {
public:
    // Opens the plan arguments.model, with the plugin library arguments.library where it needs one, and takes all the
    // memory that its largest shapes need. Throws std::exception.
    explicit TrtDecoder(const Arguments& arguments);
    ~TrtDecoder();
    TrtDecoder(const TrtDecoder&) = delete;
    TrtDecoder& operator=(const TrtDecoder&) = delete;

    // Feeds tokens after all that came before; returns the most likely next one, of equal ones the lower id.
    int64_t Next(const std::vector<int64_t>& tokens);

private:
    using Shapes = std::map<std::string, nvinfer1::Dims>;

    struct Logger final : nvinfer1::ILogger {
        void log(Severity severity, const char* message) noexcept override;
    };

    void ReadTensors();
    void MakeContexts();
    void MakeBuffers();
    Shapes InputShapes(int64_t width) const;
    nvinfer1::IExecutionContext& ContextFor(const Shapes& shapes) const;
    void Upload(const std::string& name, const std::vector<int64_t>& numbers);
    void* Address(const std::string& name) const { return buffers_.at(name)->data(); }

    // In the order in which they must outlive each other.
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // one per profile
    std::vector<std::string> inputs_, outputs_;
    std::map<std::string, std::unique_ptr<DeviceBuffer>> buffers_;  // by tensor name
    cudaStream_t stream_ = nullptr;
    int64_t total_ = 0;  // tokens so far
};

}  // namespace vq
