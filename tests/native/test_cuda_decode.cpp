// The VQTopK and VQSample kernels' own source, run on the host block by block, against the host references in double.
#include "cuda_on_host.h"
// The above first: the kernels are compiled with its meaning of CUDA's words.
#include "buckets.h"
#include "decode_case.h"
#include "sample.cuh"
#include "top_k.cuh"

namespace vq::device {
alignas(16) uint4 decode_shared[cuda_on_host::kMaxShared / sizeof(uint4)];
}

namespace {

using cuda_on_host::Launch;
using decode_case::Bias;
using decode_case::Case;
using decode_case::Guarded;
using vq::DeviceBuckets;
using vq::GatherScatterShape;
using vq::GpuLimits;
using vq::StreamPlan;
using vq::Type;

constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat16, Type::kBFloat16};
constexpr int32_t kThreads = 64;  // of blocks whose width is free: an emulated barrier costs by the thread
constexpr GpuLimits kTinyGpu{3, 100 << 10, 99 << 10};

vq::StreamArgs Stream(const Case& c, const StreamPlan& plan) {
    return {c.code_logits.data(),
            c.words.data(),
            c.bias.empty() ? nullptr : c.bias.data(),
            c.shape,
            vq::WordsPerCodebook(c.shape.vocab_size, c.code_bits) * 32 / c.code_bits,
            plan};
}

template <typename Args>
void LaunchOnHost(void (*kernel)(Args), int64_t rows, int64_t parts, int32_t threads, int64_t shared,
                  const Args& args) {
    Launch(dim3(static_cast<unsigned>(rows), static_cast<unsigned>(parts)), dim3(static_cast<unsigned>(threads)),
           static_cast<size_t>(shared), vq::device::decode_shared, kernel, args);
}

DeviceBuckets Pointers(const vq::Buckets& b) {
    return {b.starts.data(), b.by_id.data(),     b.by_rank.data(),   b.rank_bias.empty() ? nullptr : b.rank_bias.data(),
            b.head.data(),   b.head_bias.data(), b.next_bias.data(), b.mass.data(),
            b.num_codes()};
}

vq::Buckets BucketsOf(const Case& c) {
    return vq::BuildBuckets(c.codes.data(), c.biases.empty() ? nullptr : c.biases.data(), c.shape.vocab_size);
}

void TopK(const Case& c, int64_t k, const StreamPlan& plan) {
    const auto kernels = vq::TopKKernelsOf(c.type, c.code_bits);
    const auto rows = static_cast<size_t>(c.shape.rows), best = static_cast<size_t>(k);
    Guarded<float> values(rows * best), logsumexp(rows);
    Guarded<int64_t> ids(rows * best);
    Guarded<unsigned long long> keys(rows * best * static_cast<size_t>(plan.parts));
    Guarded<float2> logs(rows * static_cast<size_t>(plan.parts));
    const vq::TopKStreamArgs args{Stream(c, plan), static_cast<int>(k), {keys.data(), logs.data()},
                                  values.data(),   ids.data(),          logsumexp.data()};
    LaunchOnHost(kernels.stream, c.shape.rows, plan.parts, plan.threads, plan.shared_bytes, args);
    if (plan.parts > 1) {
        LaunchOnHost(&vq::device::TopKMerge, c.shape.rows, 1, kThreads, vq::plan::kScratchBytes, args);
    }
    const std::string what = "top " + std::to_string(k) + " parts=" + std::to_string(plan.parts) +
                             " split=" + std::to_string(plan.split) + " chunk=" + std::to_string(plan.chunk);
    (void)keys.Take(what), (void)logs.Take(what);
    c.CheckTopK(k, values.Take(what), ids.Take(what), logsumexp.Take(what), what);
}

void TopKInCodeSpace(const Case& c, int64_t k) {
    const auto kernels = vq::TopKKernelsOf(c.type, c.code_bits);
    const auto rows = static_cast<size_t>(c.shape.rows), best = static_cast<size_t>(k);
    const vq::Buckets buckets = BucketsOf(c);
    Guarded<float> values(rows * best), logsumexp(rows);
    Guarded<int64_t> ids(rows * best);
    const vq::TopKBucketArgs args{c.code_logits.data(), c.words.data(), c.shape.num_codes, static_cast<int>(k),
                                  Pointers(buckets),    values.data(),  ids.data(),        logsumexp.data()};
    LaunchOnHost(kernels.buckets, c.shape.rows, 1, kThreads, vq::plan::kScratchBytes, args);
    const std::string what = "code space, top " + std::to_string(k);
    c.CheckTopK(k, values.Take(what), ids.Take(what), logsumexp.Take(what), what);
}

std::vector<float> Uniform(const Case& c, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<float> u(static_cast<size_t>(c.shape.rows));
    for (float& x : u) x = static_cast<float>(random() >> 8) * 0x1p-24f;
    u.front() = 0.0f;
    u.back() = 1.0f - 0x1p-24f;  // the largest below 1
    return u;
}

void Sample(const Case& c, float temperature, const StreamPlan& plan) {
    const auto kernels = vq::SampleKernelsOf(c.type, c.code_bits);
    const auto rows = static_cast<size_t>(c.shape.rows);
    const auto uniform = Uniform(c, 7);
    Guarded<int64_t> ids(rows);
    Guarded<float> logprob(rows);
    Guarded<float2> logs(rows * static_cast<size_t>(plan.parts));
    const vq::SampleStreamArgs args{Stream(c, plan), &temperature, uniform.data(),
                                    logs.data(),     ids.data(),   logprob.data()};
    LaunchOnHost(kernels.parts, c.shape.rows, plan.parts, plan.threads, plan.shared_bytes, args);
    LaunchOnHost(kernels.token, c.shape.rows, 1, plan.threads, plan.shared_bytes, args);
    const std::string what = "sample parts=" + std::to_string(plan.parts);
    (void)logs.Take(what);
    c.CheckSample(temperature, uniform, ids.Take(what), logprob.Take(what), what);
}

void SampleInCodeSpace(const Case& c, float temperature, bool with_buckets) {
    const auto kernels = vq::SampleKernelsOf(c.type, c.code_bits);
    const auto rows = static_cast<size_t>(c.shape.rows);
    const auto uniform = Uniform(c, 8);
    const vq::Buckets buckets = BucketsOf(c);
    Guarded<int64_t> ids(rows);
    Guarded<float> logprob(rows);
    std::vector<unsigned> peaks(static_cast<size_t>(c.shape.num_codes));
    std::vector<unsigned long long> sums(peaks.size());
    const bool counted = with_buckets && c.bias.empty();
    const vq::SampleCodeArgs args{c.code_logits.data(),
                                  c.words.data(),
                                  c.bias.empty() ? nullptr : c.bias.data(),
                                  c.shape.num_codes,
                                  c.shape.vocab_size,
                                  &temperature,
                                  uniform.data(),
                                  counted ? nullptr : peaks.data(),
                                  sums.data(),
                                  with_buckets ? Pointers(buckets) : DeviceBuckets{},
                                  ids.data(),
                                  logprob.data()};
    if (!counted) {
        LaunchOnHost(kernels.peaks, 2, 1, 64, 0, args);
        LaunchOnHost(kernels.sums, 2, 1, 64, 0, args);
    }
    LaunchOnHost(kernels.code, c.shape.rows, 1, kThreads, vq::plan::kScratchBytes, args);
    const std::string what = with_buckets ? "sample with buckets" : "sample without buckets";
    c.CheckSample(temperature, uniform, ids.Take(what), logprob.Take(what), what);
}

// Hand-made plans: every split, chunks, parts of several tiles, a last tile with tokens missing.
void EveryKernel() {
    uint32_t seed = 1;
    for (const Type type : kTypes) {
        for (const int64_t num_codes : {23, 300}) {
            for (const int32_t split : {1, 2, 4}) {
                for (const int64_t chunk : {0, 2, 5}) {
                    const GatherScatterShape shape{4, 5, num_codes, 1229};
                    const Case c(shape, type, static_cast<Bias>(seed % 4), seed % 2 == 0, seed);
                    StreamPlan plan{};
                    plan.threads = 32 * split;
                    plan.split = split;
                    vq::CompleteStreamPlan(plan, shape, type, c.code_bits, 1 + seed % 3, 64 << 10);
                    plan.chunk = chunk;
                    TopK(c, seed % 5 == 0 ? 1 : 1 + seed * 37 % 256, plan);
                    Sample(c, seed % 2 == 0 ? 1.0f : 0.7f, plan);
                    ++seed;
                }
            }
        }
    }
}

// Sizes at the edges, with the plan that the launcher would choose.
void ChosenPlans() {
    const GatherScatterShape shapes[] = {{1, 1, 1, 1},       {2, 2, 2, 7},       {1, 3, 257, 1000}, {4, 1, 17, 3001},
                                         {1, 64, 256, 2500}, {2, 2, 20000, 600}, {7, 8, 16, 129}};
    uint32_t seed = 1000;
    for (const auto& shape : shapes) {
        const Case c(shape, kTypes[seed % 3], static_cast<Bias>(seed % 4), seed % 2 == 1, seed);
        const StreamPlan plan = vq::PlanStream(shape, c.type, c.code_bits, kTinyGpu);
        TopK(c, std::min<int64_t>(seed % 2 == 0 ? 50 : 256, shape.vocab_size), plan);
        if (shape.num_codebooks > 1) Sample(c, 1.3f, plan);
        ++seed;
    }
}

// One codebook: few and large buckets, more codes than tokens, buckets that masks empty of weight, many equal values.
void CodeSpace() {
    const GatherScatterShape shapes[] = {
        {1, 1, 1, 1}, {3, 1, 1, 700}, {2, 1, 5, 2000}, {3, 1, 300, 5000}, {2, 1, 3000, 900}};
    uint32_t seed = 2000;
    for (const auto& shape : shapes) {
        for (const Bias bias : {Bias::kNone, Bias::kRandom, Bias::kZero, Bias::kMasked}) {
            const Case c(shape, kTypes[seed % 3], bias, seed % 2 == 0, seed);
            for (const int64_t k : {1, 50, 256}) TopKInCodeSpace(c, std::min(k, shape.vocab_size));
            for (const bool with_buckets : {true, false})
                SampleInCodeSpace(c, seed % 3 == 0 ? 0.25f : 1.5f, with_buckets);
            ++seed;
        }
    }
}

// A logit so large that rounding makes different biases equal: then the lower id comes first, wherever it stands.
void RoundingTies() {
    Case same({2, 1, 7, 500}, Type::kFloat32, Bias::kRandom, true, 11);
    std::mt19937 random(3);
    for (float& x : same.scores) x = 0x1p20f;
    for (float& x : same.biases) x = static_cast<float>(random() % 14) * 0x1p-8f;  // all below half a unit of 2^20
    std::memcpy(same.code_logits.data(), same.scores.data(), same.code_logits.size());
    std::memcpy(same.bias.data(), same.biases.data(), same.bias.size());
    const vq::Buckets buckets = BucketsOf(same);
    for (const int k : {3, 40}) {  // fewer than there are codes, and more
        const auto best = static_cast<size_t>(k);
        Guarded<float> values(2 * best), logsumexp(2);
        Guarded<int64_t> ids(2 * best);
        const vq::TopKBucketArgs args{same.code_logits.data(), same.words.data(), 7,          k,
                                      Pointers(buckets),       values.data(),     ids.data(), logsumexp.data()};
        LaunchOnHost(vq::TopKKernelsOf(Type::kFloat32, 8).buckets, 2, 1, kThreads, vq::plan::kScratchBytes, args);
        const auto found = ids.Take("rounding ties");
        for (size_t i = 0; i < found.size(); ++i) {
            CHECK(found[i] == static_cast<int64_t>(i % best),
                  << "rank " << i << " of " << k << " is token " << found[i]);
        }
    }
}

// NaN ends in some token, never in a hang or outside of the vocabulary.
void NotANumber() {
    for (const int64_t num_codebooks : {1, 3}) {
        Case c({2, num_codebooks, 20, 900}, Type::kFloat32, Bias::kRandom, false, 5);
        auto* scores = reinterpret_cast<float*>(c.code_logits.data());
        const float nan = std::nanf("");
        for (size_t i = 0; i < c.scores.size(); ++i) {
            if (i < c.scores.size() / 2 ? i % 3 == 0 : true) scores[i] = nan;
        }
        const StreamPlan plan = vq::PlanStream(c.shape, c.type, c.code_bits, kTinyGpu);
        const vq::Buckets buckets = num_codebooks == 1 ? BucketsOf(c) : vq::Buckets{};
        const float temperature = 1.0f;
        const std::vector<float> uniform = {0.5f, nan};
        Guarded<int64_t> ids(2 * 60), drawn(2);
        Guarded<float> values(2 * 60), logsumexp(2), logprob(2);
        Guarded<unsigned long long> keys(2 * 60 * static_cast<size_t>(plan.parts));
        Guarded<float2> logs(2 * static_cast<size_t>(plan.parts));
        const vq::TopKStreamArgs pass{Stream(c, plan), 60,         {keys.data(), logs.data()},
                                      values.data(),   ids.data(), logsumexp.data()};
        const auto in_range = [&](const std::vector<int64_t>& tokens, const char* what) {
            for (const int64_t v : tokens) CHECK(v >= 0 && v < 900, << what << ": token " << v);
        };
        LaunchOnHost(vq::TopKKernelsOf(c.type, 8).stream, 2, plan.parts, plan.threads, plan.shared_bytes, pass);
        if (plan.parts > 1) LaunchOnHost(&vq::device::TopKMerge, 2, 1, kThreads, vq::plan::kScratchBytes, pass);
        in_range(ids.Take("NaN"), "stream");
        CHECK(std::isnan(values.Take("NaN")[0]) && std::isnan(logsumexp.Take("NaN")[1]));
        if (num_codebooks > 1) {
            const vq::SampleStreamArgs draw{Stream(c, plan), &temperature, uniform.data(),
                                            logs.data(),     drawn.data(), logprob.data()};
            const auto kernels = vq::SampleKernelsOf(c.type, 8);
            LaunchOnHost(kernels.parts, 2, plan.parts, plan.threads, plan.shared_bytes, draw);
            LaunchOnHost(kernels.token, 2, 1, plan.threads, plan.shared_bytes, draw);
            in_range(drawn.Take("NaN"), "sample");
            continue;
        }
        const vq::TopKBucketArgs codes{scores,     c.words.data(),  20, 60, Pointers(buckets), values.data(),
                                       ids.data(), logsumexp.data()};
        LaunchOnHost(vq::TopKKernelsOf(c.type, 8).buckets, 2, 1, kThreads, vq::plan::kScratchBytes, codes);
        in_range(ids.Take("NaN"), "code space");
        std::vector<unsigned> peaks(20);
        std::vector<unsigned long long> sums(20);
        for (const bool with_buckets : {true, false}) {
            const vq::SampleCodeArgs draw{scores,
                                          c.words.data(),
                                          c.bias.data(),
                                          20,
                                          900,
                                          &temperature,
                                          uniform.data(),
                                          peaks.data(),
                                          sums.data(),
                                          with_buckets ? Pointers(buckets) : DeviceBuckets{},
                                          drawn.data(),
                                          logprob.data()};
            const auto kernels = vq::SampleKernelsOf(c.type, 8);
            LaunchOnHost(kernels.peaks, 2, 1, 64, 0, draw);
            LaunchOnHost(kernels.sums, 2, 1, 64, 0, draw);
            LaunchOnHost(kernels.code, 2, 1, kThreads, vq::plan::kScratchBytes, draw);
            in_range(drawn.Take("NaN"), "sample in code space");
        }
    }
}

// What a GPU would refuse or what would leave out a token, over sizes that no emulation could run.
void PlansAreSound() {
    const GpuLimits gpus[] = {{132, 228 << 10, 227 << 10},
                              {108, 164 << 10, 163 << 10},
                              {8, 64 << 10, 48 << 10},
                              {999, 228 << 10, 227 << 10},
                              kTinyGpu};
    for (const auto& gpu : gpus) {
        for (const Type type : kTypes) {
            for (const int64_t rows : {1, 2, 64, 4096}) {
                for (const int64_t m : {1, 2, 8, 144, 1000}) {
                    for (const int64_t k : {1, 256, 1280, 65536}) {
                        for (const int64_t v : {1, 100, 50257, 128256, 524288}) {
                            const GatherScatterShape shape{rows, m, k, v};
                            const int32_t bits = vq::CodeBits(k);
                            const StreamPlan p = vq::PlanStream(shape, type, bits, gpu);
                            const int64_t tile = vq::plan::TileTokens(p, bits);
                            const bool whole = p.tiles * tile >= v && (p.tiles - 1) * tile < v &&
                                               p.parts * p.per_part >= p.tiles &&
                                               (p.parts - 1) * p.per_part < p.tiles && p.chunk <= m;
                            const bool fits =
                                p.threads % (32 * p.split) == 0 && p.threads <= vq::plan::kStreamThreads &&
                                p.shared_bytes <= gpu.shared_per_block && rows * p.parts <= vq::plan::MostParts(rows);
                            CHECK(whole && fits, << "rows=" << rows << " M=" << m << " K=" << k << " V=" << v << " on "
                                                 << gpu.multiprocessors << " multiprocessors");
                        }
                    }
                }
            }
        }
    }
    // A decode step on a large GPU: all of a product head's code logits staged once in each of a block per
    // multiprocessor.
    const StreamPlan product = vq::PlanStream({1, 144, 256, 128256}, Type::kFloat16, 8, gpus[0]);
    CHECK(product.chunk == 144 && product.parts > 100 && product.parts <= 132, << product.parts << " parts");
    const StreamPlan single = vq::PlanStream({1, 1, 1280, 128256}, Type::kFloat16, 16, gpus[0]);
    CHECK(single.parts > 100, << single.parts << " parts");
}

}  // namespace

int main() {
    EveryKernel();
    ChosenPlans();
    CodeSpace();
    RoundingTies();
    NotANumber();
    PlansAreSound();
    return check::Done("cuda_decode");
}
