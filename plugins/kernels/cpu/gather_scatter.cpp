#include "cpu/gather_scatter.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

// Look-ups below which a second thread costs more than it brings.
constexpr int64_t kLookupsPerPart = 1 << 16;
// Single-codebook rows whose tables stay in the second cache together (floats).
constexpr int64_t kTableFloats = 1 << 16;
// From so many rows on, eight rows at once beat one at a time, even with some of the eight empty: 5.5 ms for all eight
// where one took 1.2 in fixed point and 1.8 without (M=144, V=50257, one core of a server of 2023).
constexpr int64_t kMinRowsTogether = 5;
// How many blocks ahead memory is asked for. After a decode step's backbone nothing of the head is in the caches, and
// the hardware's own prefetching starts anew at every page: the first lines of a page are enough to start it.
constexpr int64_t kBlocksAhead = 4;
constexpr int64_t kLinesAhead = 4;
constexpr uintptr_t kPage = 4096;

// Asks for the page that begins in the `step` bytes up to `memory`, if one does.
template <int kWrite>
void PrefetchPage(const void* memory, int64_t step) {
    const auto at = reinterpret_cast<uintptr_t>(memory);
    if (at % kPage >= static_cast<uintptr_t>(step)) return;
    const char* page = static_cast<const char*>(memory) - at % kPage;
    for (int64_t i = 0; i < kLinesAhead; ++i) __builtin_prefetch(page + 64 * i, kWrite, 3);
}

const Kernels& KernelsOf(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::kAvx2:
            return Avx2Kernels();
        case Isa::kAvx512:
            return Avx512Kernels();
        case Isa::kAvx512Vbmi:
            return Avx512VbmiKernels();
#elif defined(__aarch64__)
        case Isa::kNeon:
            return NeonKernels();
#endif
        default:
            return PortableKernels();
    }
}

}  // namespace

Isa BestIsa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return __builtin_cpu_supports("avx512vbmi") ? Isa::kAvx512Vbmi : Isa::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#elif defined(__aarch64__)
    return Isa::kNeon;
#endif
    return Isa::kPortable;
}

const char* IsaName(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kNeon:
            return "NEON";
        case Isa::kAvx2:
            return "AVX2";
        case Isa::kAvx512:
            return "AVX-512";
        case Isa::kAvx512Vbmi:
            return "AVX-512 VBMI";
    }
    return "unknown";
}

void Serial(int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
}

void Widen(const void* in, Type type, int64_t count, float* out) {
    if (type == Type::kFloat32) {
        std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
    } else {
        PortableKernels().widen(in, type, count, out);
    }
}

struct GatherScatter::Packed {
    int64_t vocab_size;
    int64_t num_codebooks;
    int32_t code_bits;
    int64_t blocks;
    std::vector<uint8_t> codes;  // ids [blocks, M, kBlock] of code_bits
    std::vector<float> bias;     // [blocks * kBlock], or empty
    const Kernels* kernels;

    Block At(int64_t block, int64_t num_codes) const {
        const int64_t bytes = num_codebooks * kBlock * code_bits / 8;
        return {codes.data() + block * bytes, bias.empty() ? nullptr : bias.data() + block * kBlock, num_codebooks,
                num_codes, code_bits};
    }

    // Sums of `rows` rows ([.., kBlock] each, kBlock apart in `sums`) to logits of T, without the padding.
    void Store(const float* sums, int64_t rows, int64_t block, Type type, char* logits) const {
        const int64_t v = block * kBlock, count = std::min(kBlock, vocab_size - v);
        for (int64_t r = 0; r < rows; ++r) {
            char* out = logits + (r * vocab_size + v) * SizeOf(type);
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
    : packed_(new Packed) {
    Packed& p = *packed_;
    const int64_t m_count = num_codebooks;
    p.vocab_size = vocab_size;
    p.num_codebooks = m_count;
    p.code_bits = CodeBits(int64_t{*std::max_element(codes, codes + vocab_size * m_count)} + 1);
    p.blocks = (vocab_size + kBlock - 1) / kBlock;
    p.kernels = &KernelsOf(isa);
    p.codes.assign(static_cast<size_t>(p.blocks * m_count * kBlock * p.code_bits / 8), 0);
    for (int64_t v = 0; v < vocab_size; ++v) {
        for (int64_t m = 0; m < m_count; ++m) {
            const int64_t at = ((v / kBlock) * m_count + m) * kBlock + v % kBlock;
            const int32_t id = codes[v * m_count + m];
            if (p.code_bits == 8) {
                p.codes[static_cast<size_t>(at)] = static_cast<uint8_t>(id);
            } else {
                const auto wide = static_cast<uint16_t>(id);
                std::memcpy(p.codes.data() + at * 2, &wide, sizeof wide);
            }
        }
    }
    if (bias != nullptr) {
        p.bias.assign(static_cast<size_t>(p.blocks * kBlock), 0.0f);
        std::copy(bias, bias + vocab_size, p.bias.begin());
    }
}

GatherScatter::~GatherScatter() = default;

// One call of Run, its scores in float32.
struct GatherScatter::Job {
    const Packed& p;
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

    bool HasFixed() const {
        return p.kernels->to_fixed_point != nullptr && p.code_bits == 8 && num_codes <= 256 &&
               p.num_codebooks >= kMinFixedCodebooks && p.num_codebooks <= kMaxFixedCodebooks;
    }

    void Run() const {
        if (p.num_codebooks == 1) {
            const int64_t tile = std::clamp<int64_t>(kTableFloats / Width(), 1, rows);
            for (int64_t first = 0; first < rows; first += tile) RowByRow(first, std::min(tile, rows - first), {});
            return;
        }
        const bool has_fixed = HasFixed();
        for (int64_t first = 0; first < rows; first += kRows) {
            const int64_t count = std::min(kRows, rows - first);
            if (count >= kMinRowsTogether) {
                Together(first, count);
            } else if (has_fixed) {
                Fixed(first, count);
            } else {
                RowByRow(first, count, {});
            }
        }
    }

    // body(block) for all blocks, cut into parts for the threads.
    template <typename Body>
    void ForEachBlock(int64_t tile_rows, const Body& body) const {
        const int64_t lookups = p.blocks * kBlock * tile_rows * p.num_codebooks;
        const int64_t parts = std::clamp<int64_t>(std::min(threads, lookups / kLookupsPerPart), 1, p.blocks);
        const auto part = [&](int64_t i) {
            for (int64_t b = p.blocks * i / parts; b < p.blocks * (i + 1) / parts; ++b) body(b);
        };
        if (parts == 1) return part(0);
        parallel(parts, part);
    }

    // A block's code ids serve all rows of a tile while they are in the first cache. `fixed`: the rows' tables in fixed
    // point, null for a row that has none; empty where no row has.
    void RowByRow(int64_t first, int64_t count, const std::vector<const FixedPoint*>& fixed) const {
        ForEachBlock(count, [&](int64_t b) {
            const Block block = p.At(b, num_codes);
            const bool direct = type == Type::kFloat32 && (b + 1) * kBlock <= p.vocab_size;
            alignas(64) float sums[kBlock];
            if (b + kBlocksAhead < p.blocks) {
                PrefetchPage<0>(p.At(b + kBlocksAhead, num_codes).codes, p.num_codebooks * kBlock * p.code_bits / 8);
            }
            for (int64_t r = 0; r < count; ++r) {
                float* out = direct ? reinterpret_cast<float*>(Logits(first + r)) + b * kBlock : sums;
                if (direct && (b + 1 + kBlocksAhead) * kBlock <= p.vocab_size) {
                    PrefetchPage<1>(out + kBlocksAhead * kBlock, kBlock * int64_t{sizeof(float)});
                }
                if (!fixed.empty() && fixed[static_cast<size_t>(r)] != nullptr) {
                    p.kernels->one_row_fixed(*fixed[static_cast<size_t>(r)], block, out);
                } else {
                    p.kernels->one_row(Scores(first + r), block, out);
                }
                if (!direct) p.Store(sums, 1, b, type, Logits(first + r));
            }
        });
    }

    void Fixed(int64_t first, int64_t count) const {
        const int64_t bytes = p.num_codebooks * FixedPoint::kPlanes * 256;
        std::vector<uint8_t> planes(static_cast<size_t>(count * bytes));
        std::vector<FixedPoint> tables(static_cast<size_t>(count));
        std::vector<const FixedPoint*> fixed;
        for (int64_t r = 0; r < count; ++r) {
            FixedPoint& table = tables[static_cast<size_t>(r)];
            table.planes = planes.data() + r * bytes;
            const bool fits = p.kernels->to_fixed_point(Scores(first + r), p.num_codebooks, num_codes, &table);
            fixed.push_back(fits ? &table : nullptr);
        }
        RowByRow(first, count, fixed);
    }

    void Together(int64_t first, int64_t count) const {
        const int64_t width = Width();
        std::vector<float> tables(static_cast<size_t>(width * kRows)), padded;
        const float* eight = Scores(first);
        if (count < kRows) {
            padded.assign(static_cast<size_t>(kRows * width), 0.0f);
            std::copy(eight, eight + count * width, padded.begin());
            eight = padded.data();
        }
        p.kernels->interleave(eight, width, width, tables.data());
        ForEachBlock(1, [&](int64_t b) {
            alignas(64) float sums[kRows * kBlock];
            p.kernels->eight_rows(tables.data(), p.At(b, num_codes), sums);
            p.Store(sums, count, b, type, Logits(first));
        });
    }
};

void GatherScatter::Run(const void* code_logits, void* logits, int64_t rows, int64_t num_codes, Type type,
                        const ParallelFor& parallel, int64_t threads) const {
    if (rows == 0) return;
    std::vector<float> widened;
    const auto* scores = static_cast<const float*>(code_logits);
    if (type != Type::kFloat32) {
        widened.resize(static_cast<size_t>(rows * packed_->num_codebooks * num_codes));
        packed_->kernels->widen(code_logits, type, static_cast<int64_t>(widened.size()), widened.data());
        scores = widened.data();
    }
    Job{*packed_, scores, rows, num_codes, static_cast<char*>(logits), type, parallel, threads}.Run();
}

}  // namespace vq::cpu
