#include "capi/capi.h"

#include <exception>
#include <string>

#include "cpu/gather_scatter.h"
#include "vq/shape.h"
#ifdef VQ_HAS_CUDA
#include "vq/launch.h"
#endif

extern "C" {

const char* vq_gather_scatter_cpu(const void* code_logits, const int32_t* codes, const float* bias, void* logits,
                                  int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size,
                                  int32_t type, int32_t isa, int64_t parts) {
    thread_local std::string error;
    try {
        const vq::GatherScatterShape shape{rows, num_codebooks, num_codes, vocab_size};
        error = vq::CheckShape(shape);
        if (error.empty()) error = vq::CheckCodes(codes, shape);
        if (error.empty() && (type < 0 || type > 2)) error = "type is " + std::to_string(type) + ", expected 0 to 2";
        if (!error.empty()) return error.c_str();
        const auto chosen = isa < 0 ? vq::cpu::BestIsa() : static_cast<vq::cpu::Isa>(isa);
        vq::cpu::GatherScatter(codes, bias, vocab_size, num_codebooks, chosen)
            .Run(code_logits, logits, rows, num_codes, static_cast<vq::Type>(type), vq::cpu::Serial, parts);
        return nullptr;
    } catch (const std::exception& failure) {
        error = failure.what();
        return error.c_str();
    }
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

int32_t vq_best_isa() { return static_cast<int32_t>(vq::cpu::BestIsa()); }

}  // extern "C"
