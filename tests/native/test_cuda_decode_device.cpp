// The VQTopK and VQSample kernels on a GPU through their launchers, against the host references in double: small sizes
// that take every kind of plan, so that compute-sanitizer can run over all of it. Exit code 77, which CTest counts as
// skipped, where there is no GPU.
#include <cuda_runtime_api.h>

#include "decode_case.h"
#include "device_buckets.h"
#include "device_bytes.h"
#include "vq/contract.h"
#include "vq/launch.h"

namespace {

using decode_case::Bias;
using decode_case::Case;
using decode_case::Guarded;
using device_bytes::DeviceBytes;
using device_bytes::Ok;
using vq::Type;

// A guarded buffer with its copy on the device.
template <typename Number>
struct Output {
    explicit Output(int64_t count)
        : host(static_cast<size_t>(count)), device(host.all.data(), host.all.size() * sizeof(Number)) {}

    Number* data() const { return reinterpret_cast<Number*>(device.data()) + Guarded<Number>::kGuard; }
    std::vector<Number> Take(const std::string& what) {
        device.Read(host.all.data());
        return host.Take(what);
    }

    Guarded<Number> host;
    DeviceBytes device;
};

// Exactly as large as a caller is told, so that a sanitizer sees a byte beyond.
struct Workspace {
    explicit Workspace(int64_t bytes)
        : poison(static_cast<size_t>(bytes), 0xff), device(poison.data(), poison.size()) {}
    std::vector<unsigned char> poison;
    DeviceBytes device;
};

// A head on the device; with tables for code space where it has one codebook and `with_buckets`.
struct Head {
    Head(const Case& c, bool with_buckets)
        : code_logits(c.code_logits.data(), c.code_logits.size()),
          words(c.words.data(), c.words.size() * sizeof(uint32_t)),
          bias(c.bias.data(), c.bias.size()) {
        if (!with_buckets) return;
        const float* const biases = c.biases.empty() ? nullptr : c.biases.data();
        Ok(buckets.Upload(vq::BuildBuckets(c.codes.data(), biases, c.shape.vocab_size)), "buckets");
    }
    DeviceBytes code_logits, words, bias;
    vq::OwnedBuckets buckets;
};

void TopK(const Case& c, int64_t k, bool with_buckets, cudaStream_t stream) {
    const Head head(c, with_buckets);
    Output<float> values(c.shape.rows * k), logsumexp(c.shape.rows);
    Output<int64_t> ids(c.shape.rows * k);
    const Workspace workspace(vq::TopKWorkspaceBytes(c.shape, k));
    const vq::TopKArgs args{head.code_logits.data(),
                            head.words.data(),
                            head.bias.data(),
                            values.data(),
                            ids.data(),
                            logsumexp.data(),
                            workspace.device.data(),
                            c.shape,
                            k,
                            c.code_bits,
                            c.type,
                            head.buckets.get()};
    const std::string what = with_buckets ? "code space" : "pass";
    Ok(cudaDeviceSynchronize(), "copies");  // the stream does not wait for them
    Ok(vq::LaunchVQTopK(args, stream), "launch");
    if (!Ok(cudaStreamSynchronize(stream), c.Name().c_str())) return;
    c.CheckTopK(k, values.Take(what), ids.Take(what), logsumexp.Take(what), what);
}

void Sample(const Case& c, float temperature, bool with_buckets, cudaStream_t stream) {
    const Head head(c, with_buckets);
    std::vector<float> uniform(static_cast<size_t>(c.shape.rows));
    std::mt19937 random(5);
    for (float& x : uniform) x = static_cast<float>(random() >> 8) * 0x1p-24f;
    if (!uniform.empty()) uniform.front() = 0.0f, uniform.back() = 1.0f - 0x1p-24f;
    const DeviceBytes heat(&temperature, sizeof(temperature)), draws(uniform.data(), uniform.size() * sizeof(float));
    Output<int64_t> ids(c.shape.rows);
    Output<float> logprob(c.shape.rows);
    const Workspace workspace(vq::SampleWorkspaceBytes(c.shape));
    const vq::SampleArgs args{head.code_logits.data(),
                              head.words.data(),
                              head.bias.data(),
                              reinterpret_cast<const float*>(heat.data()),
                              reinterpret_cast<const float*>(draws.data()),
                              ids.data(),
                              logprob.data(),
                              workspace.device.data(),
                              c.shape,
                              c.code_bits,
                              c.type,
                              head.buckets.get()};
    const std::string what = with_buckets ? "code space" : "pass";
    Ok(cudaDeviceSynchronize(), "copies");
    Ok(vq::LaunchVQSample(args, stream), "launch");
    if (!Ok(cudaStreamSynchronize(stream), c.Name().c_str())) return;
    c.CheckSample(temperature, uniform, ids.Take(what), logprob.Take(what), what);
}

void TestRefusals(cudaStream_t stream) {
    vq::TopKArgs top_k{};
    top_k.shape = {1, 2, 1, 9};
    top_k.code_bits = 8;
    for (const int64_t k : {0, 10, 257}) {
        top_k.k = k;
        CHECK(vq::LaunchVQTopK(top_k, stream) == cudaErrorInvalidValue, << k);
    }
    top_k.k = 1;
    top_k.buckets.codes = 1;  // of two codebooks there are no buckets
    CHECK(vq::LaunchVQTopK(top_k, stream) == cudaErrorInvalidValue);
    vq::SampleArgs sample{};
    sample.shape = {1, 1, 1, 1};
    sample.code_bits = 7;
    CHECK(vq::LaunchVQSample(sample, stream) == cudaErrorInvalidValue);
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("cuda_decode_device: skipped, no CUDA device\n");
        return 77;
    }
    cudaStream_t stream = nullptr;
    if (!Ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"))
        return check::Done("cuda_decode_device");
    const vq::GatherScatterShape shapes[] = {{1, 1, 1, 1},        {1, 1, 1280, 20000}, {5, 1, 17, 4099},
                                             {3, 1, 65536, 9000}, {64, 1, 300, 2056},  {1, 64, 256, 9999},
                                             {3, 5, 257, 2056},   {200, 2, 100, 1024}, {2, 24, 4096, 3000},
                                             {1, 200, 256, 999},  {2, 3, 40, 70001}};
    uint32_t seed = 1;
    for (const auto& shape : shapes) {
        for (const Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16}) {
            for (const Bias bias : {Bias::kNone, Bias::kRandom, Bias::kZero, Bias::kMasked}) {
                const Case c(shape, type, bias, seed % 2 == 0, seed);
                for (const bool with_buckets : {false, true}) {
                    if (with_buckets && shape.num_codebooks > 1) continue;
                    for (const int64_t k : {int64_t{1}, int64_t{50}, int64_t{vq::contract::kMaxBest}}) {
                        TopK(c, std::min(k, shape.vocab_size), with_buckets, stream);
                    }
                    for (const float temperature : {1.0f, 0.25f, 5.0f}) Sample(c, temperature, with_buckets, stream);
                }
                ++seed;
            }
        }
    }
    const Case empty({0, 2, 5, 17}, Type::kFloat16, Bias::kNone, true, 1);
    TopK(empty, 3, false, stream);
    Sample(empty, 1.0f, false, stream);
    TestRefusals(stream);
    cudaStreamDestroy(stream);
    return check::Done("cuda_decode_device");
}
