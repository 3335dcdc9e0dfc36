// enqueue on a GPU against the host reference: types, odd sizes, several streams, CUDA graphs. Outputs are poisoned
// before each run and fenced on both sides. Without a GPU it says so and exits with 77, which ctest shows as skipped.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "half.h"
#include "tensorrt_host.h"
#include "vq/reference.h"

namespace {

using host::DataType;
using host::Fields;
using host::Library;
using host::Plugin;
using host::PluginTensorDesc;
using host::Tensor;
using nvinfer1::IPluginCreatorV3One;

constexpr int kSkipped = 77;
constexpr unsigned char kPoison = 0xFF;  // in all three types far from any logit
constexpr size_t kFence = 256;           // bytes on either side of an output

void Cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}
#define CUDA(call) Cuda(call, #call)

vq::Type TypeOf(DataType type) {
    return type == DataType::kFLOAT  ? vq::Type::kFloat32
           : type == DataType::kHALF ? vq::Type::kFloat16
                                     : vq::Type::kBFloat16;
}

struct Buffer {
    explicit Buffer(size_t size) : bytes(size) { CUDA(cudaMalloc(&data, size + 2 * kFence)); }
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    char* Inner() const { return static_cast<char*>(data) + kFence; }

    void* data = nullptr;
    size_t bytes;
};

struct Sizes {
    int64_t rows, num_codebooks, num_codes, vocab_size;
    bool has_bias;
};

// One execution context with its device memory, and what it must compute.
class Case {
public:
    Case(IPluginCreatorV3One* creator, const Sizes& sizes, DataType type, uint32_t seed)
        : sizes_(sizes), type_(type), random_(seed), plugin_(MakePlugin(creator)) {
        const auto [rows, m, k, v, has_bias] = sizes;
        const size_t element = vq::SizeOf(TypeOf(type));
        codes_.resize(v * m);
        for (int32_t& id : codes_) id = std::uniform_int_distribution<int32_t>(0, static_cast<int32_t>(k) - 1)(random_);
        std::vector<uint32_t> words(m * vq::WordsPerCodebook(v, vq::CodeBits(k)));
        vq::PackCodes(codes_.data(), v, m, vq::CodeBits(k), words.data());
        inputs_[0] = std::make_unique<Buffer>(rows * m * k * element);
        inputs_[1] = std::make_unique<Buffer>(words.size() * sizeof(uint32_t));
        inputs_[2] = std::make_unique<Buffer>(v * element);
        output_ = std::make_unique<Buffer>(rows * v * element);
        CUDA(cudaMemcpy(inputs_[1]->Inner(), words.data(), inputs_[1]->bytes, cudaMemcpyHostToDevice));
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        in_ = {Tensor(type, {rows, m * k}), Tensor(DataType::kINT32, {m, static_cast<int64_t>(words.size()) / m})};
        if (has_bias) in_.push_back(Tensor(type, {v}));
        out_ = Tensor(type, {rows, v});
        CHECK(plugin_.runtime->onShapeChange(in_.data(), static_cast<int32_t>(in_.size()), &out_, 1) == 0);
    }
    ~Case() { cudaStreamDestroy(stream); }
    Case(const Case&) = delete;
    Case& operator=(const Case&) = delete;

    // New numbers in, poison out.
    void Prepare() {
        scores_ = Fill(*inputs_[0]);
        bias_ = Fill(*inputs_[2]);
        CUDA(cudaMemset(output_->data, kPoison, output_->bytes + 2 * kFence));
        CUDA(cudaDeviceSynchronize());
    }

    void Enqueue() {
        const void* inputs[] = {inputs_[0]->Inner(), inputs_[1]->Inner(), inputs_[2]->Inner()};
        void* outputs[] = {output_->Inner()};
        CHECK(plugin_.runtime->enqueue(in_.data(), &out_, inputs, outputs, nullptr, stream) == 0);
    }

    // Every logit against float64, within the rounding of float32 sums and of one store; the fences untouched.
    void Verify(const char* how) {
        CUDA(cudaStreamSynchronize(stream));
        std::vector<char> found(output_->bytes + 2 * kFence);
        CUDA(cudaMemcpy(found.data(), output_->data, found.size(), cudaMemcpyDeviceToHost));
        const auto [rows, m, k, v, has_bias] = sizes_;
        const vq::GatherScatterShape shape{rows, m, k, v};
        const auto reference = [&](std::vector<double> scores, std::vector<double> bias) {
            std::vector<double> logits(rows * v);
            vq::GatherScatterReference(scores.data(), codes_.data(), has_bias ? bias.data() : nullptr, logits.data(),
                                       shape);
            return logits;
        };
        const auto magnitudes = [](std::vector<double> values) {
            for (double& value : values) value = std::fabs(value);
            return values;
        };
        const std::vector<double> expected = reference(scores_, bias_);
        const std::vector<double> sums = reference(magnitudes(scores_), magnitudes(bias_));
        const std::vector<float> logits = half::Load(found.data() + kFence, rows * v, TypeOf(type_));
        for (int64_t i = 0; i < rows * v; ++i) {
            const double summing = static_cast<double>(m) * std::ldexp(1.0, -24) * sums[i];  // m additions at most
            const double storing = half::Rounding(std::fabs(expected[i]) + summing, TypeOf(type_));
            CHECK(std::fabs(logits[i] - expected[i]) <= summing + storing,
                  << how << " rows=" << rows << " M=" << m << " K=" << k << " V=" << v << " at " << i << ": "
                  << logits[i] << ", expected " << expected[i]);
        }
        for (size_t i = 0; i < kFence; ++i) {
            const bool whole = static_cast<unsigned char>(found[i]) == kPoison &&
                               static_cast<unsigned char>(found[found.size() - 1 - i]) == kPoison;
            CHECK(whole, << how << " V=" << v << ": byte " << i << " from the outside of a fence was written");
        }
    }

    cudaStream_t stream = nullptr;

private:
    Plugin MakePlugin(IPluginCreatorV3One* creator) const {
        Fields fields(static_cast<int32_t>(sizes_.num_codebooks), vq::CodeBits(sizes_.num_codes),
                      static_cast<int32_t>(sizes_.vocab_size));
        const Plugin plugin(host::Create(creator, fields));
        host::ResourceContext context;
        return Plugin(plugin.runtime->attachToContext(&context));
    }

    // Random numbers of T into device memory; the same numbers, exactly, for the reference.
    std::vector<double> Fill(const Buffer& buffer) {
        std::vector<float> values(buffer.bytes / vq::SizeOf(TypeOf(type_)));
        if (values.empty()) return {};
        for (float& value : values)
            value = half::Rounded(std::normal_distribution<float>(0.0F, 3.0F)(random_), TypeOf(type_));
        std::vector<char> bytes(buffer.bytes);
        half::Store(values, TypeOf(type_), bytes.data());
        CUDA(cudaMemcpy(buffer.Inner(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
        return {values.begin(), values.end()};
    }

    const Sizes sizes_;
    const DataType type_;
    std::mt19937 random_;
    Plugin plugin_;
    std::vector<int32_t> codes_;
    std::vector<double> scores_, bias_;
    std::unique_ptr<Buffer> inputs_[3], output_;
    std::vector<PluginTensorDesc> in_;
    PluginTensorDesc out_;
};

constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

void TestSizes(IPluginCreatorV3One* creator) {
    const Sizes all[] = {
        {0, 1, 5, 7, true},      {1, 1, 1, 1, false},     {1, 1, 2, 3, true},        {1, 3, 256, 1009, true},
        {2, 2, 257, 513, false}, {3, 7, 31, 1021, true},  {5, 1, 512, 4099, true},   {8, 8, 256, 4096, false},
        {17, 4, 100, 997, true}, {257, 2, 64, 131, true}, {1, 1, 65536, 8191, true}, {4, 64, 256, 50257, true},
    };
    for (const Sizes& sizes : all) {
        for (const DataType type : kTypes) {
            Case one(creator, sizes, type, 1);
            one.Prepare();
            one.Enqueue();
            one.Verify("one stream");
        }
    }
}

// Contexts of three types on their own streams at once, many times over without waiting in between.
void TestStreams(IPluginCreatorV3One* creator) {
    std::vector<std::unique_ptr<Case>> cases;
    for (uint32_t i = 0; i < 6; ++i) {
        cases.push_back(std::make_unique<Case>(creator, Sizes{33, 5, 250, 30011, i % 2 == 0}, kTypes[i % 3], i));
        cases.back()->Prepare();
    }
    for (int round = 0; round < 20; ++round) {
        for (const auto& one : cases) one->Enqueue();
    }
    for (const auto& one : cases) one->Verify("six streams");
}

// The strictest capture mode fails on any allocation or wait inside enqueue. What was captured is run on new numbers.
void TestGraph(IPluginCreatorV3One* creator) {
    for (const DataType type : kTypes) {
        Case one(creator, Sizes{9, 3, 300, 5003, true}, type, 3);
        one.Prepare();
        one.Enqueue();  // TensorRT too asks for one run before a capture
        one.Verify("before capture");
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        CUDA(cudaStreamBeginCapture(one.stream, cudaStreamCaptureModeGlobal));
        one.Enqueue();
        CUDA(cudaStreamEndCapture(one.stream, &graph));
        CUDA(cudaGraphInstantiate(&executable, graph, 0));
        for (int replay = 0; replay < 3; ++replay) {
            one.Prepare();
            CUDA(cudaGraphLaunch(executable, one.stream));
            one.Verify("graph replay");
        }
        CUDA(cudaGraphExecDestroy(executable));
        CUDA(cudaGraphDestroy(graph));
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: %s libvq_trt.so\n", argv[0]), 2;
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess || devices == 0) {
        std::printf("tensorrt enqueue: skipped, there is no GPU (%s)\n", cudaGetErrorString(status));
        return kSkipped;
    }
    Library library(argv[1]);
    IPluginCreatorV3One* creator = library.Creator();
    TestSizes(creator);
    TestStreams(creator);
    TestGraph(creator);
    CHECK_QUIET(library);
    return check::Done("tensorrt enqueue");
}
