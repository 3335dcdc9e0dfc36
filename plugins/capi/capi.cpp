#include "capi/capi.h"

#include <algorithm>
#include <string>

#include "capi/guarded.h"
#include "cpu/gather_scatter.h"
#include "vq/shape.h"
#ifdef VQ_HAS_CUDA
#include "vq/launch.h"
#endif

namespace {

constexpr int64_t kMostCodes = int64_t{1} << 16;

struct HeadOnHost {
    vq::cpu::GatherScatter kernel;
    int64_t num_codebooks;
    int64_t vocab_size;
    int32_t largest_id;
};

}  // namespace

extern "C" {

const char* vq_make_gather_scatter_cpu(const int32_t* codes, const float* bias, int64_t num_codebooks,
                                       int64_t vocab_size, int32_t isa, void** made) {
    return vq::Guarded([&]() -> std::string {
        const vq::GatherScatterShape shape{0, num_codebooks, kMostCodes, vocab_size};
        std::string error = vq::CheckShape(shape);
        if (error.empty()) error = vq::CheckCodes(codes, shape);
        if (!error.empty()) return error;
        const auto chosen = isa < 0 ? vq::cpu::BestIsa() : static_cast<vq::cpu::Isa>(isa);
        const int32_t largest = *std::max_element(codes, codes + vocab_size * num_codebooks);
        *made = new HeadOnHost{{codes, bias, vocab_size, num_codebooks, chosen}, num_codebooks, vocab_size, largest};
        return {};
    });
}

void vq_free_gather_scatter_cpu(void* head) { delete static_cast<HeadOnHost*>(head); }

const char* vq_gather_scatter_cpu(const void* head, const void* code_logits, void* logits, int64_t rows,
                                  int64_t num_codes, int32_t type) {
    return vq::Guarded([&]() -> std::string {
        const auto& [kernel, num_codebooks, vocab_size, largest_id] = *static_cast<const HeadOnHost*>(head);
        if (auto error = vq::CheckShape({rows, num_codebooks, num_codes, vocab_size}); !error.empty()) return error;
        if (num_codes <= largest_id) {
            return "num_codes is " + std::to_string(num_codes) + ", expected more than the largest code id, " +
                   std::to_string(largest_id);
        }
        if (type < 0 || type > 2) return "type is " + std::to_string(type) + ", expected 0 to 2";
        kernel.Run(code_logits, logits, rows, num_codes, static_cast<vq::Type>(type), vq::cpu::Serial, 1);
        return {};
    });
}

int vq_gather_scatter_cuda([[maybe_unused]] const void* code_logits, [[maybe_unused]] const void* codes,
                           [[maybe_unused]] const void* bias, [[maybe_unused]] void* logits,
                           [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t num_codebooks,
                           [[maybe_unused]] int64_t num_codes, [[maybe_unused]] int64_t vocab_size,
                           [[maybe_unused]] int32_t code_bits, [[maybe_unused]] int32_t type,
                           [[maybe_unused]] void* stream) {
#ifdef VQ_HAS_CUDA
    const vq::GatherScatterShape shape{rows, num_codebooks, num_codes, vocab_size};
    return vq::LaunchVQGatherScatter({code_logits, codes, bias, logits, shape, code_bits, static_cast<vq::Type>(type)},
                                     static_cast<cudaStream_t>(stream));
#else
    return 801;
#endif
}

void vq_pack_codes(const int32_t* codes, int64_t vocab_size, int64_t num_codebooks, int32_t code_bits,
                   uint32_t* words) {
    vq::PackCodes(codes, vocab_size, num_codebooks, code_bits, words);
}

}  // extern "C"
