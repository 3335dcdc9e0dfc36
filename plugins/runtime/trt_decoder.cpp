#include "trt_decoder.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace vq {
namespace {

using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;
using nvinfer1::TensorIOMode;

constexpr char kAnswer[] = "ids";
constexpr char kPast[] = "past_key_values.";
constexpr char kPresent[] = "present.";

bool StartsWith(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

std::string PresentOf(const std::string& past) { return kPresent + past.substr(sizeof(kPast) - 1); }

void Demand(bool held, const std::string& sentence) {
    if (!held) throw std::runtime_error(sentence);
}

void Demand(cudaError_t status, const char* what) {
    Demand(status == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(status));
}

std::vector<char> ReadFile(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    Demand(file.good(), path + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool IsBetween(const Dims& low, const Dims& dims, const Dims& high) {
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] < low.d[i] || dims.d[i] > high.d[i]) return false;
    }
    return true;
}

// Bytes of the types that a decoder's tensors have.
size_t SizeOf(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kHALF:
        case nvinfer1::DataType::kBF16:
            return 2;
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32:
            return 4;
        case nvinfer1::DataType::kINT64:
            return 8;
        default:
            throw std::runtime_error("the plan has an input of a type that no decoder of export-vq has");
    }
}

nvinfer1::IRuntime* OpenRuntime(const std::string& library, nvinfer1::ILogger& logger) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);
    Demand(handle != nullptr, (handle ? "" : std::string(dlerror())) + "; name TensorRT with --runtime FILE");
    const auto create = reinterpret_cast<void* (*)(void*, int32_t)>(dlsym(handle, "createInferRuntime_INTERNAL"));
    Demand(create != nullptr, library + ": not TensorRT, it has no createInferRuntime_INTERNAL");
    auto* runtime = static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION));
    Demand(runtime != nullptr, library + ": TensorRT does not start; it may be older than the headers of this program");
    return runtime;
}

}  // namespace

DeviceBuffer::DeviceBuffer(size_t size) {
    // An empty tensor needs an address too.
    Demand(cudaMalloc(&data_, std::max<size_t>(size, 1)), "memory on the GPU");
}

void TrtDecoder::Logger::log(Severity severity, const char* message) noexcept {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", message);
}

TrtDecoder::TrtDecoder(const Arguments& arguments) : runtime_(OpenRuntime(arguments.runtime, logger_)) {
    if (!arguments.library.empty()) {
        Demand(runtime_->getPluginRegistry().loadLibrary(arguments.library.c_str()) != nullptr,
               arguments.library + ": TensorRT cannot load this plugin library");
    }
    const std::vector<char> plan = ReadFile(arguments.model);
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    Demand(engine_ != nullptr, arguments.model + ": TensorRT cannot load this plan");
    Demand(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a CUDA stream");
    ReadTensors();
    MakeContexts();
    MakeBuffers();
}

TrtDecoder::~TrtDecoder() {
    if (stream_ != nullptr) {
        cudaStreamSynchronize(stream_);
        cudaStreamDestroy(stream_);
    }
}

void TrtDecoder::ReadTensors() {
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
        const std::string name = engine_->getIOTensorName(i);
        const bool is_input = engine_->getTensorIOMode(name.c_str()) == TensorIOMode::kINPUT;
        (is_input ? inputs_ : outputs_).push_back(name);
    }
    const auto has_output = [&](const std::string& name) {
        return std::count(outputs_.begin(), outputs_.end(), name) > 0;
    };
    Demand(has_output(kAnswer) && engine_->getTensorShape(kAnswer).nbDims == 3,
           "the plan gives no best tokens (ids [batch, positions, k]); export with --output topk");
    for (const std::string& name : inputs_) {
        const bool is_past = StartsWith(name, kPast);
        Demand(is_past || name == "input_ids" || name == "attention_mask" || name == "position_ids",
               "the plan has an input " + name + ", which is none of a decoder's");
        Demand(is_past || engine_->getTensorDataType(name.c_str()) == nvinfer1::DataType::kINT64,
               "the plan's " + name + " is not int64; build it from a graph of export-vq");
        Demand(!is_past || has_output(PresentOf(name)), "the plan takes " + name + " but gives no " + PresentOf(name));
    }
}

// One per profile: switching one between profiles would stall the stream.
void TrtDecoder::MakeContexts() {
    for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
        contexts_.emplace_back(engine_->createExecutionContext());
        Demand(contexts_.back() != nullptr, "TensorRT gives no execution context: out of memory on the GPU?");
        Demand(contexts_.back()->setOptimizationProfileAsync(profile, stream_), "TensorRT refuses a profile");
    }
    Demand(cudaStreamSynchronize(stream_), "setting the profiles");
}

void TrtDecoder::MakeBuffers() {
    std::map<std::string, size_t> sizes;
    for (size_t p = 0; p < contexts_.size(); ++p) {
        for (const std::string& name : inputs_) {
            const char* c_name = name.c_str();
            const Dims most = engine_->getProfileShape(c_name, static_cast<int32_t>(p), OptProfileSelector::kMAX);
            size_t size = SizeOf(engine_->getTensorDataType(c_name));
            for (int32_t i = 0; i < most.nbDims; ++i) size *= static_cast<size_t>(most.d[i]);
            sizes[name] = std::max(sizes[name], size);
            Demand(contexts_[p]->setInputShape(c_name, most), "TensorRT refuses the largest shape of " + name);
        }
        for (const std::string& name : outputs_) {
            const auto size = static_cast<size_t>(contexts_[p]->getMaxOutputSize(name.c_str()));
            sizes[name] = std::max(sizes[name], size);
        }
    }
    for (const std::string& name : inputs_) {  // past and present take turns
        if (StartsWith(name, kPast))
            sizes[name] = sizes[PresentOf(name)] = std::max(sizes[name], sizes[PresentOf(name)]);
    }
    for (const auto& [name, size] : sizes) buffers_[name] = std::make_unique<DeviceBuffer>(size);
}

TrtDecoder::Shapes TrtDecoder::InputShapes(int64_t width) const {
    Shapes shapes;
    for (const std::string& name : inputs_) {
        Dims dims = engine_->getTensorShape(name.c_str());
        dims.d[0] = 1;
        if (StartsWith(name, kPast)) {
            dims.d[2] = total_;
        } else {
            dims.d[1] = name == "attention_mask" ? total_ + width : width;
        }
        shapes[name] = dims;
    }
    return shapes;
}

nvinfer1::IExecutionContext& TrtDecoder::ContextFor(const Shapes& shapes) const {
    for (size_t p = 0; p < contexts_.size(); ++p) {
        const auto fits = [&](const Shapes::value_type& input) {
            const auto bound = [&](OptProfileSelector which) {
                return engine_->getProfileShape(input.first.c_str(), static_cast<int32_t>(p), which);
            };
            return IsBetween(bound(OptProfileSelector::kMIN), input.second, bound(OptProfileSelector::kMAX));
        };
        if (std::all_of(shapes.begin(), shapes.end(), fits)) return *contexts_[p];
    }
    throw std::runtime_error("no profile of the plan serves " + std::to_string(total_) +
                             " tokens so far; build it again with larger --max-shapes");
}

void TrtDecoder::Upload(const std::string& name, const std::vector<int64_t>& numbers) {
    if (buffers_.count(name) == 0) return;  // not every architecture has position_ids
    Demand(cudaMemcpyAsync(Address(name), numbers.data(), numbers.size() * sizeof(int64_t), cudaMemcpyHostToDevice,
                           stream_),
           "copying to the GPU");
}

int64_t TrtDecoder::Next(const std::vector<int64_t>& tokens) {
    const auto width = static_cast<int64_t>(tokens.size());
    const Shapes shapes = InputShapes(width);
    nvinfer1::IExecutionContext& context = ContextFor(shapes);
    std::vector<int64_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), total_);
    const std::vector<int64_t> mask(static_cast<size_t>(total_ + width), 1);
    Upload("input_ids", tokens);
    Upload("position_ids", positions);
    Upload("attention_mask", mask);
    for (const auto& [name, dims] : shapes) {
        Demand(context.setInputShape(name.c_str(), dims), "TensorRT refuses the shape of " + name);
    }
    for (const auto& [name, buffer] : buffers_) {
        Demand(context.setTensorAddress(name.c_str(), buffer->data()), "TensorRT refuses the address of " + name);
    }
    Demand(context.enqueueV3(stream_), "TensorRT refuses to run");

    const Dims dims = context.getTensorShape(kAnswer);  // [1, S, k], S = 1 with --last-token
    const int64_t* last = static_cast<const int64_t*>(Address(kAnswer)) + (dims.d[1] - 1) * dims.d[2];
    int64_t token = 0;
    Demand(cudaMemcpyAsync(&token, last, sizeof token, cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
    Demand(cudaStreamSynchronize(stream_), "running the plan");
    total_ += width;
    for (const std::string& name : inputs_) {
        if (StartsWith(name, kPast)) std::swap(buffers_.at(name), buffers_.at(PresentOf(name)));
    }
    return token;
}

}  // namespace vq
