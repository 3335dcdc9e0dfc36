#include "decode_cuda_op.h"

#include <utility>
#include <vector>

#include "vq/launch.h"

namespace vq::ort {
namespace {

int CurrentDevice() {
    int device = 0;
    Check(cudaGetDevice(&device), "asking for the GPU");
    return device;
}

// Workspace of one run, from ONNX Runtime's own allocator. It is given back while the kernels are still to run: whoever
// gets it next runs after them, on the same stream.
class Workspace {
public:
    Workspace(const Ort::KernelContext& context, const Ort::MemoryInfo& memory, int64_t bytes)
        : allocator_(context.GetAllocator(*static_cast<const OrtMemoryInfo*>(memory))),
          data_(allocator_.Alloc(static_cast<size_t>(bytes))) {}
    ~Workspace() { allocator_.Free(data_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    void* data() const { return data_; }

private:
    Ort::Allocator allocator_;
    void* data_;
};

// The sizes of this run and the leading dimensions of code_logits.
std::pair<GatherScatterShape, std::vector<int64_t>> SizesOf(const DecodeHead& head, const Ort::ConstValue& scores) {
    auto [shape, rows] = head.constants.Sizes(scores.GetTensorTypeAndShapeInfo().GetShape());
    rows.pop_back();
    return {shape, rows};
}

}  // namespace

DecodeHead::DecodeHead(const OrtKernelInfo* info)
    : DeviceHead(info), memory("Cuda", OrtArenaAllocator, CurrentDevice(), OrtMemTypeDefault) {
    if (constants.num_codebooks() != 1) return;
    const std::vector<float> wide = constants.WideBias();
    const float* const bias_or_null = wide.empty() ? nullptr : wide.data();
    Check(buckets.Upload(BuildBuckets(constants.codes(), bias_or_null, constants.vocab_size())),
          "copying the head's tables to the GPU");
}

OrtStatusPtr TopKCudaKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        const auto [shape, rows] = SizesOf(head_, scores);
        auto best = rows;
        best.push_back(k_);
        TopKArgs args{};
        args.code_logits = scores.GetTensorRawData();
        args.codes = head_.codes.get();
        args.bias = head_.bias.get();
        args.values = context.GetOutput(0, best).GetTensorMutableData<float>();
        args.ids = context.GetOutput(1, best).GetTensorMutableData<int64_t>();
        args.logsumexp = context.GetOutput(2, rows).GetTensorMutableData<float>();
        const Workspace workspace(context, head_.memory, TopKWorkspaceBytes(shape, k_));
        args.workspace = workspace.data();
        args.shape = shape;
        args.k = k_;
        args.code_bits = head_.code_bits;
        args.type = head_.constants.type();
        args.buckets = head_.buckets.get();
        Check(LaunchVQTopK(args, static_cast<cudaStream_t>(context.GetGPUComputeStream())), "launching the kernels");
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kTopK, error, ORT_FAIL);
    }
}

OrtStatusPtr SampleCudaKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        const auto temperature = context.GetInput(contract::kTemperature),
                   uniform = context.GetInput(contract::kUniform);
        const auto [shape, rows] = SizesOf(head_, scores);
        const auto found = temperature.GetTensorTypeAndShapeInfo().GetShape();
        if (found != std::vector<int64_t>{1}) Refuse("temperature has shape " + Written(found) + ", expected [1]");
        const auto draws = uniform.GetTensorTypeAndShapeInfo().GetShape();
        if (draws != rows) Refuse("uniform has shape " + Written(draws) + ", expected " + Written(rows));
        SampleArgs args{};
        args.code_logits = scores.GetTensorRawData();
        args.codes = head_.codes.get();
        args.bias = head_.bias.get();
        args.temperature = temperature.GetTensorData<float>();
        args.uniform = uniform.GetTensorData<float>();
        args.ids = context.GetOutput(0, rows).GetTensorMutableData<int64_t>();
        args.logprob = context.GetOutput(1, rows).GetTensorMutableData<float>();
        const Workspace workspace(context, head_.memory, SampleWorkspaceBytes(shape));
        args.workspace = workspace.data();
        args.shape = shape;
        args.code_bits = head_.code_bits;
        args.type = head_.constants.type();
        args.buckets = head_.buckets.get();
        Check(LaunchVQSample(args, static_cast<cudaStream_t>(context.GetGPUComputeStream())), "launching the kernels");
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kSample, error, ORT_FAIL);
    }
}

}  // namespace vq::ort
