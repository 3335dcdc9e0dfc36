#include "cpu/sample.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/bucket_draw.h"
#include "cpu/stream.h"

namespace vq::cpu {
namespace {

// What a row costs with one codebook, in look-ups: a few passes over the codes in use.
constexpr int64_t kLookupsPerBucket = 8;

}  // namespace

struct Sample::Packed {
    const Kernels* kernels;
    std::optional<Buckets> buckets;    // one codebook ...
    std::vector<float> masses;         // [U], at temperature 1
    std::optional<PackedCodes> codes;  // ... or more
};

Sample::Sample(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks, Isa isa)
    : packed_(new Packed{&KernelsOf(isa), {}, {}, {}}) {
    if (num_codebooks == 1) {
        packed_->buckets.emplace(codes, bias, vocab_size, Buckets::Order::kById);
        packed_->masses = packed_->buckets->Masses(packed_->kernels->decode, 1.0f);
    } else {
        packed_->codes.emplace(codes, bias, vocab_size, num_codebooks);
    }
}

Sample::~Sample() = default;

// One call of Run, its scores in float32.
struct Sample::Job {
    const Packed& packed;
    const float* scores;  // [rows, M*K]
    float scale;          // 1 / temperature
    const float* uniform;
    int64_t* ids;
    float* logprob;
    int64_t rows;
    int64_t num_codes;
    const ParallelFor& parallel;
    int64_t threads;

    void Run() const {
        if (packed.buckets) return InCodeSpace();
        for (int64_t first = 0; first < rows; first += kRows) OverAllTokens(first, std::min(kRows, rows - first));
    }

    void InCodeSpace() const {
        std::vector<float> tempered;
        if (scale != 1.0f) tempered = packed.buckets->Masses(packed.kernels->decode, scale);
        const std::vector<float>& masses = scale != 1.0f ? tempered : packed.masses;
        const int64_t lookups = rows * kLookupsPerBucket * packed.buckets->Count();
        ForParts(rows, PartsFor(rows, lookups, threads), parallel, [&](int64_t begin, int64_t end, int64_t) {
            BucketDraw draw(*packed.buckets, masses, packed.kernels->decode, scale);
            for (int64_t r = begin; r < end; ++r) {
                draw.Row(scores + r * num_codes, static_cast<double>(uniform[r]), ids + r, logprob + r);
            }
        });
    }

    // First what every block weighs; then the block that the draw falls on once more, for the token in it.
    void OverAllTokens(int64_t first, int64_t count) const {
        const PackedCodes& codes = *packed.codes;
        const Stream stream(codes, *packed.kernels, scores + first * codes.num_codebooks * num_codes, count, num_codes);
        std::vector<Mass> masses(static_cast<size_t>(count * codes.blocks));
        stream.Run(stream.Parts(threads), parallel, [&](int64_t, int64_t row, int64_t block, float* sums) {
            masses[static_cast<size_t>(row * codes.blocks + block)] =
                MassOf(packed.kernels->decode, sums, kBlock, scale);
        });
        for (int64_t row = 0; row < count; ++row) {
            DrawToken(stream, row, masses.data() + row * codes.blocks, first + row);
        }
    }

    void DrawToken(const Stream& stream, int64_t row, const Mass* masses, int64_t at) const {
        const PackedCodes& codes = *packed.codes;
        const Mass total = Total(masses, codes.blocks, scale);
        const Drawn block = DrawMass(masses, codes.blocks, total, scale, static_cast<double>(uniform[at]));
        alignas(64) float logits[kBlock], weights[kBlock];
        stream.Sums(row, block.index, logits);
        std::copy(logits, logits + kBlock, weights);
        // These sums may be rounded otherwise than the first time. What that is, times the inverse of a small
        // temperature, must not come between this block's peak and that of all.
        Mass mass = MassOf(packed.kernels->decode, weights, kBlock, scale);
        const double own = mass.peak, wide = scale;
        mass.peak = masses[block.index].peak;
        const int64_t within = DrawFrom(weights, kBlock, mass, total, scale, block.share).index;
        ids[at] = block.index * kBlock + within;
        logprob[at] = static_cast<float>((static_cast<double>(logits[within]) - own) * wide +
                                         (mass.peak - total.peak) * wide - std::log(total.sum));
    }
};

void Sample::Run(const void* code_logits, float temperature, const float* uniform, int64_t* ids, float* logprob,
                 int64_t rows, int64_t num_codes, Type type, const ParallelFor& parallel, int64_t threads) const {
    if (rows == 0) return;
    // The inverse of the smallest temperatures is infinite, and 0 times that NaN.
    const float scale = std::min(1.0f / temperature, std::numeric_limits<float>::max());
    const int64_t m_count = packed_->codes ? packed_->codes->num_codebooks : 1;
    const Widened scores(*packed_->kernels, code_logits, type, rows * m_count * num_codes);
    Job{*packed_, scores.data(), scale, uniform, ids, logprob, rows, num_codes, parallel, threads}.Run();
}

}  // namespace vq::cpu
