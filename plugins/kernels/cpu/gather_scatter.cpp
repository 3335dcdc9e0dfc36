#include "cpu/gather_scatter.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/row_tables.h"

namespace vq::cpu {
namespace {

// Single-codebook rows whose tables stay in the second cache together (floats).
constexpr int64_t kTableFloats = 1 << 16;

}  // namespace

struct GatherScatter::Packed {
    PackedCodes codes;
    const Kernels* kernels;

    // Sums of `rows` rows ([.., kBlock] each, kBlock apart in `sums`) to logits of T, without the padding.
    void Store(const float* sums, int64_t rows, int64_t block, Type type, char* logits) const {
        const int64_t v = block * kBlock, count = std::min(kBlock, codes.vocab_size - v);
        for (int64_t r = 0; r < rows; ++r) {
            char* out = logits + (r * codes.vocab_size + v) * SizeOf(type);
            if (type == Type::kFloat32) {
                std::memcpy(out, sums + r * kBlock, static_cast<size_t>(count) * sizeof(float));
            } else {
                kernels->narrow(sums + r * kBlock, type, count, out);
            }
        }
    }
};

GatherScatter::GatherScatter(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks,
                             Isa isa)
    : packed_(new Packed{{codes, bias, vocab_size, num_codebooks}, &KernelsOf(isa)}) {}

GatherScatter::~GatherScatter() = default;

// One call of Run, its scores in float32.
struct GatherScatter::Job {
    const Packed& packed;
    const PackedCodes& p;
    const float* scores;  // [rows, M*K]
    int64_t rows;
    int64_t num_codes;
    char* logits;  // T [rows, V]
    Type type;
    const ParallelFor& parallel;
    int64_t threads;

    int64_t Width() const { return p.num_codebooks * num_codes; }
    const float* Scores(int64_t row) const { return scores + row * Width(); }
    char* Logits(int64_t row) const { return logits + row * p.vocab_size * SizeOf(type); }

    void Run() const {
        const bool single = p.num_codebooks == 1;
        const int64_t tile = single ? std::clamp<int64_t>(kTableFloats / Width(), 1, rows) : kRows;
        for (int64_t first = 0; first < rows; first += tile) {
            const int64_t count = std::min(tile, rows - first);
            if (single || count < kMinRowsTogether) {
                RowByRow(first, count);
            } else {
                Together(first, count);
            }
        }
    }

    // body(block) for all blocks, cut into parts for the threads.
    template <typename Body>
    void ForEachBlock(int64_t tile_rows, const Body& body) const {
        const int64_t lookups = p.blocks * kBlock * tile_rows * p.num_codebooks;
        ForParts(p.blocks, PartsFor(p.blocks, lookups, threads), parallel, [&](int64_t begin, int64_t end, int64_t) {
            for (int64_t b = begin; b < end; ++b) body(b);
        });
    }

    // A block's code ids serve all rows of a tile while they are in the first cache.
    void RowByRow(int64_t first, int64_t count) const {
        const RowTables tables(p, *packed.kernels, Scores(first), count, num_codes);
        ForEachBlock(count, [&](int64_t b) {
            const Block block = p.At(b, num_codes);
            const bool direct = type == Type::kFloat32 && (b + 1) * kBlock <= p.vocab_size;
            alignas(64) float sums[kBlock];
            p.PrefetchAfter(b);
            for (int64_t r = 0; r < count; ++r) {
                float* out = direct ? reinterpret_cast<float*>(Logits(first + r)) + b * kBlock : sums;
                if (direct && (b + 1 + kBlocksAhead) * kBlock <= p.vocab_size) {
                    PrefetchPage<1>(out + kBlocksAhead * kBlock, kBlock * int64_t{sizeof(float)});
                }
                tables.Sums(r, block, out);
                if (!direct) packed.Store(sums, 1, b, type, Logits(first + r));
            }
        });
    }

    void Together(int64_t first, int64_t count) const {
        const std::vector<float> tables = Interleaved(*packed.kernels, Scores(first), count, Width());
        ForEachBlock(1, [&](int64_t b) {
            alignas(64) float sums[kRows * kBlock];
            packed.kernels->eight_rows(tables.data(), p.At(b, num_codes), sums);
            packed.Store(sums, count, b, type, Logits(first));
        });
    }
};

void GatherScatter::Run(const void* code_logits, void* logits, int64_t rows, int64_t num_codes, Type type,
                        const ParallelFor& parallel, int64_t threads) const {
    if (rows == 0) return;
    const PackedCodes& codes = packed_->codes;
    std::vector<float> widened;
    const auto* scores = static_cast<const float*>(code_logits);
    if (type != Type::kFloat32) {
        widened.resize(static_cast<size_t>(rows * codes.num_codebooks * num_codes));
        packed_->kernels->widen(code_logits, type, static_cast<int64_t>(widened.size()), widened.data());
        scores = widened.data();
    }
    Job{*packed_, codes, scores, rows, num_codes, static_cast<char*>(logits), type, parallel, threads}.Run();
}

}  // namespace vq::cpu
