// The CUDA kernels' own source, run on the host block by block, against the host reference in double: every kernel
// there is, with plans made by hand and with those that the launcher would choose.
#include "cuda_on_host.h"
// The above first: the kernels are compiled with its meaning of CUDA's words.
#include "gather_scatter.cuh"
#include "gather_scatter_case.h"

namespace vq::device {
alignas(16) uint4 gather_scatter_shared[cuda_on_host::kMaxShared / sizeof(uint4)];
}

namespace {

using gather_scatter_case::Case;
using gather_scatter_case::kGuard;
using vq::GatherScatterPlan;
using vq::GatherScatterShape;
using vq::GpuLimits;
using vq::Type;

constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat16, Type::kBFloat16};
// Two multiprocessors keep the emulated launches small while rows are still many for them.
constexpr GpuLimits kTinyGpu{2, 100 << 10, 99 << 10};

std::string Name(const Case& c, const GatherScatterPlan& p, size_t offset) {
    std::ostringstream name;
    name << Name(c) << " R=" << p.rows_per_block << " threads=" << p.threads << "x" << p.split << " chunk=" << p.chunk
         << " parts=" << p.parts << " groups=" << p.groups << (p.vector_stores ? " vector" : " element")
         << " offset=" << offset;
    return name.str();
}

// offset: bytes by which the logits are off a 16-byte boundary.
void Run(const Case& c, const GatherScatterPlan& p, size_t offset = 0) {
    const auto kernel = vq::GatherScatterKernel(c.type, c.code_bits, p);
    CHECK(kernel != nullptr, << Name(c, p, offset));
    if (kernel == nullptr) return;
    auto logits = c.PoisonedLogits(offset);
    const vq::GatherScatterKernelArgs args{c.code_logits.data(),
                                           c.words.data(),
                                           c.bias.empty() ? nullptr : c.bias.data(),
                                           logits.data() + kGuard + offset,
                                           c.shape,
                                           vq::WordsPerCodebook(c.shape.vocab_size, c.code_bits) * 32 / c.code_bits,
                                           p};
    cuda_on_host::Launch(dim3(static_cast<unsigned>(p.parts), static_cast<unsigned>(p.grid_groups)),
                         dim3(static_cast<unsigned>(p.threads), static_cast<unsigned>(p.split)),
                         static_cast<size_t>(p.shared_bytes), vq::device::gather_scatter_shared, kernel, args);
    c.Check(logits, offset, Name(c, p, offset));
}

// Every kernel, on the smallest blocks that have all of: several tiles, chunks, parts, row groups, a last row group
// with rows missing, a last tile with tokens missing.
void EveryKernel() {
    uint32_t seed = 1;
    for (const Type type : kTypes) {
        for (const int32_t bits : {8, 16}) {
            for (const bool vector : {true, false}) {
                for (const int32_t rows_per_block : {0, 1, 2, 4, 8}) {  // 0: code logits not staged
                    if (rows_per_block > vq::plan::TokensPerThread(type)) continue;
                    for (const int64_t chunk : {1, 2, 5}) {
                        const GatherScatterShape shape{13, 5, chunk == 2 ? 24 : 23,
                                                       vector ? 3 * 256 + 72 : 3 * 256 + 71};
                        GatherScatterPlan p{};
                        p.rows_per_block = std::max(rows_per_block, 1);
                        p.vector_stores = vector;
                        p.threads = 32;
                        p.split = p.rows_per_block == 1 ? static_cast<int32_t>(chunk == 5 ? 4 : chunk) : 1;
                        vq::CompletePlan(p, shape, type, rows_per_block == 0 ? 0 : chunk, 2);
                        if (chunk == 1) p.grid_groups = std::min(p.grid_groups, 2);
                        const Case c(shape, type, bits, chunk != 2, seed++);
                        Run(c, p, vector ? 0 : static_cast<size_t>(vq::SizeOf(type)));
                    }
                }
            }
        }
    }
}

// Sizes at the edges, with the plan that the launcher would choose.
void ChosenPlans() {
    const GatherScatterShape shapes[] = {
        {1, 1, 1, 1},        {1, 1, 2, 7},       {1, 1, 257, 8},        {2, 3, 5, 97},      {3, 1, 1280, 4096},
        {5, 2, 300, 1031},   {7, 8, 256, 520},   {1, 256, 16, 1000},    {1, 31, 17, 2053},  {64, 1, 40, 264},
        {257, 2, 16, 129},   {33, 4, 256, 2048}, {16, 3, 4096, 1024},   {2, 1, 65536, 333}, {9, 2, 30000, 128},
        {40, 64, 256, 1536}, {1000, 1, 3, 1},    {1, 128, 256, 1 << 13}};
    uint32_t seed = 1000;
    for (const auto& shape : shapes) {
        for (const Type type : kTypes) {
            const int32_t bits = vq::CodeBits(shape.num_codes);
            const size_t offset = seed % 3 == 0 ? static_cast<size_t>(vq::SizeOf(type)) : 0;
            const Case c(shape, type, bits, seed % 2 == 0, seed);
            Run(c, vq::PlanGatherScatter(shape, type, offset == 0, kTinyGpu), offset);
            ++seed;
        }
    }
}

// What a GPU would refuse or what would leave out a token or a row, over sizes that no emulation could run.
void PlansAreSound() {
    const GpuLimits gpus[] = {{132, 228 << 10, 227 << 10}, {108, 164 << 10, 163 << 10}, {16, 164 << 10, 163 << 10},
                              {128, 100 << 10, 99 << 10},  {8, 64 << 10, 48 << 10},     kTinyGpu};
    for (const auto& gpu : gpus) {
        for (const Type type : kTypes) {
            for (const int64_t rows : {1, 2, 7, 8, 64, 257, 4096, 5'000'000}) {
                for (const int64_t m : {1, 2, 8, 64, 144, 256, 1000}) {
                    for (const int64_t k : {1, 16, 256, 1280, 4096, 20000, 65536}) {
                        for (const int64_t v : {1, 100, 50257, 128256, 200000}) {
                            const GatherScatterShape shape{rows, m, k, v};
                            const auto p = vq::PlanGatherScatter(shape, type, true, gpu);
                            const int64_t tile = int64_t{p.threads} * vq::plan::TokensPerThread(type);
                            const bool fits = p.threads % 32 == 0 && p.threads * p.split <= vq::plan::kMaxThreads &&
                                              p.shared_bytes <= gpu.shared_per_block && p.parts >= 1 &&
                                              p.grid_groups >= 1 && p.grid_groups <= vq::plan::kMaxGridY;
                            const bool whole = p.tiles * tile >= v && (p.tiles - 1) * tile < v &&
                                               p.parts * p.tiles_per_block >= p.tiles &&
                                               (p.parts - 1) * p.tiles_per_block < p.tiles &&
                                               p.groups * p.rows_per_block >= rows && p.chunk <= m && p.split <= m;
                            const bool kernel = vq::GatherScatterKernel(type, vq::CodeBits(k), p) != nullptr;
                            const bool split = p.split == 1 || p.rows_per_block == 1;
                            const bool stores = p.vector_stores == (v * vq::SizeOf(type) % 16 == 0);
                            CHECK(fits && whole && kernel && split && stores,
                                  << "rows=" << rows << " M=" << m << " K=" << k << " V=" << v << " type="
                                  << static_cast<int>(type) << " on " << gpu.multiprocessors << " multiprocessors");
                        }
                    }
                }
            }
        }
    }
}

// What the sizes of real heads must get on a large GPU.
void PlansUseTheGpu() {
    const GpuLimits large{132, 228 << 10, 227 << 10};
    const auto plan = [&](int64_t rows, int64_t m, int64_t k) {
        return vq::PlanGatherScatter({rows, m, k, 128256}, Type::kFloat16, true, large);
    };
    const auto decode = plan(1, 1, 4096);
    CHECK(decode.vector_stores && decode.chunk == 1 && decode.parts >= 120, << decode.parts << " blocks");
    const auto product = plan(1, 128, 256);
    CHECK(product.split == 4 && product.chunk == 128, << product.split << " " << product.chunk);
    for (const int64_t k : {1280, 4096}) {
        const auto prefill = plan(4096, 1, k);
        CHECK(prefill.rows_per_block == 8 && prefill.vector_stores && prefill.chunk == 1);
        CHECK(prefill.groups * prefill.parts >= 132 * 2, << prefill.parts);
        // A part stages K codes of eight rows for the logits of its tokens.
        CHECK(prefill.tiles_per_block * prefill.threads * 8 >= 4 * k, << prefill.tiles_per_block);
    }
    CHECK(plan(4096, 1, 65536).chunk == 0, << "128 KiB a row leave no room for a second block");
}

}  // namespace

int main() {
    EveryKernel();
    ChosenPlans();
    PlansAreSound();
    PlansUseTheGpu();
    return check::Done("cuda_kernels");
}
