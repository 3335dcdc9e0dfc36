#include "cpu/top_k.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/bucket_top_k.h"
#include "cpu/candidates.h"
#include "cpu/fast_scan.h"
#include "cpu/mass.h"
#include "cpu/stream.h"

namespace vq::cpu {
namespace {

// What a row costs with one codebook, in look-ups: a few passes over the codes in use, and the merge of k tokens.
int64_t BucketLookups(int64_t buckets, int64_t k) { return 4 * buckets + 128 * k; }

// Scratch for as many calls as run at a time.
class Scratches {
public:
    std::unique_ptr<FastScan::Scratch> Take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) return std::make_unique<FastScan::Scratch>();
        auto scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
    }

    void Give(std::unique_ptr<FastScan::Scratch> scratch) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(scratch));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<FastScan::Scratch>> free_;
};

}  // namespace

struct TopK::Packed {
    const Kernels* kernels;
    std::optional<Buckets> buckets;    // one codebook ...
    std::vector<float> masses;         // [U]
    std::optional<PackedCodes> codes;  // ... or more
    mutable Scratches scratches;
};

TopK::TopK(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks, Isa isa)
    : packed_(new Packed{&KernelsOf(isa), {}, {}, {}, {}}) {
    if (num_codebooks == 1) {
        packed_->buckets.emplace(codes, bias, vocab_size, Buckets::Order::kByBias);
        packed_->masses = packed_->buckets->Masses(packed_->kernels->decode, 1.0f);
    } else {
        packed_->codes.emplace(codes, bias, vocab_size, num_codebooks);
        if (FastScan::Has(*packed_->codes, *packed_->kernels)) packed_->codes->KeepByToken();
    }
}

TopK::~TopK() = default;

// One call of Run, its scores in float32.
struct TopK::Job {
    const Packed& packed;
    const float* scores;  // [rows, M*K]
    float* values;        // [rows, k]
    int64_t* ids;         // [rows, k]
    float* logsumexp;     // [rows]
    int64_t rows;
    int64_t num_codes;
    int64_t k;
    const ParallelFor& parallel;
    int64_t threads;

    void Run() const {
        if (packed.buckets) return InCodeSpace();
        if (FastScan::Serves(*packed.codes, *packed.kernels, num_codes, rows)) return InEightBits();
        for (int64_t first = 0; first < rows; first += kRows) OverAllTokens(first, std::min(kRows, rows - first));
    }

    void InEightBits() const {
        auto scratch = packed.scratches.Take();
        FastScan scan(*packed.codes, *packed.kernels, num_codes, k, parallel, threads, *scratch);
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = scores + r * packed.codes->num_codebooks * num_codes;
            if (!scan.Row(row, values + r * k, ids + r * k, logsumexp + r)) OverAllTokens(r, 1);
        }
        packed.scratches.Give(std::move(scratch));
    }

    void InCodeSpace() const {
        const int64_t lookups = rows * BucketLookups(packed.buckets->Count(), k);
        ForParts(rows, PartsFor(rows, lookups, threads), parallel, [&](int64_t begin, int64_t end, int64_t) {
            BucketTopK best(*packed.buckets, packed.masses, packed.kernels->decode, k);
            for (int64_t r = begin; r < end; ++r) {
                best.Row(scores + r * num_codes, values + r * k, ids + r * k, logsumexp + r);
            }
        });
    }

    void OverAllTokens(int64_t first, int64_t count) const {
        const PackedCodes& codes = *packed.codes;
        const Decode& decode = packed.kernels->decode;
        const Stream stream(codes, *packed.kernels, scores + first * codes.num_codebooks * num_codes, count, num_codes);
        const int64_t parts = stream.Parts(threads);
        std::vector<Candidates> best;
        for (int64_t i = 0; i < count * parts; ++i) best.emplace_back(k);
        std::vector<Mass> masses(static_cast<size_t>(count * codes.blocks));
        stream.Run(parts, parallel, [&](int64_t part, int64_t row, int64_t block, float* sums) {
            const int64_t v = block * kBlock;
            best[static_cast<size_t>(row * parts + part)].OfferBlock(decode, sums,
                                                                     std::min(kBlock, codes.vocab_size - v), v);
            masses[static_cast<size_t>(row * codes.blocks + block)] = MassOf(decode, sums, kBlock, 1.0f);
        });
        for (int64_t row = 0; row < count; ++row) {
            Candidates& all = best[static_cast<size_t>(row * parts)];
            for (int64_t part = 1; part < parts; ++part) all.Merge(best[static_cast<size_t>(row * parts + part)]);
            all.Finish(values + (first + row) * k, ids + (first + row) * k);
            const Mass mass = Total(masses.data() + row * codes.blocks, codes.blocks, 1.0);
            logsumexp[first + row] = static_cast<float>(mass.Log(1.0));
        }
    }
};

void TopK::Run(const void* code_logits, float* values, int64_t* ids, float* logsumexp, int64_t rows, int64_t num_codes,
               int64_t k, Type type, const ParallelFor& parallel, int64_t threads) const {
    if (rows == 0) return;
    const int64_t m_count = packed_->codes ? packed_->codes->num_codebooks : 1;
    const Widened scores(*packed_->kernels, code_logits, type, rows * m_count * num_codes);
    Job{*packed_, scores.data(), values, ids, logsumexp, rows, num_codes, k, parallel, threads}.Run();
}

}  // namespace vq::cpu
