#include "capi/decode_cpu.h"

#include <string>

#include "capi/guarded.h"
#include "cpu/sample.h"
#include "cpu/top_k.h"
#include "vq/shape.h"

namespace {

std::string Check(const vq::GatherScatterShape& shape, const int32_t* codes, int32_t type) {
    std::string error = vq::CheckShape(shape);
    if (error.empty()) error = vq::CheckCodes(codes, shape);
    if (error.empty() && (type < 0 || type > 2)) error = "type is " + std::to_string(type) + ", expected 0 to 2";
    return error;
}

vq::cpu::Isa Chosen(int32_t isa) { return isa < 0 ? vq::cpu::BestIsa() : static_cast<vq::cpu::Isa>(isa); }

}  // namespace

extern "C" {

const char* vq_top_k_cpu(const void* code_logits, const int32_t* codes, const float* bias, float* values, int64_t* ids,
                         float* logsumexp, int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size,
                         int64_t k, int32_t type, int32_t isa, int64_t parts) {
    return vq::Guarded([&]() -> std::string {
        if (auto error = Check({rows, num_codebooks, num_codes, vocab_size}, codes, type); !error.empty()) return error;
        if (k < 1 || k > vocab_size) {
            return "k is " + std::to_string(k) + ", expected 1 to " + std::to_string(vocab_size);
        }
        vq::cpu::TopK(codes, bias, vocab_size, num_codebooks, Chosen(isa))
            .Run(code_logits, values, ids, logsumexp, rows, num_codes, k, static_cast<vq::Type>(type), vq::cpu::Serial,
                 parts);
        return {};
    });
}

const char* vq_sample_cpu(const void* code_logits, const int32_t* codes, const float* bias, float temperature,
                          const float* uniform, int64_t* ids, float* logprob, int64_t rows, int64_t num_codebooks,
                          int64_t num_codes, int64_t vocab_size, int32_t type, int32_t isa, int64_t parts) {
    return vq::Guarded([&]() -> std::string {
        if (auto error = Check({rows, num_codebooks, num_codes, vocab_size}, codes, type); !error.empty()) return error;
        if (auto error = vq::CheckTemperature(temperature); !error.empty()) return error;
        vq::cpu::Sample(codes, bias, vocab_size, num_codebooks, Chosen(isa))
            .Run(code_logits, temperature, uniform, ids, logprob, rows, num_codes, static_cast<vq::Type>(type),
                 vq::cpu::Serial, parts);
        return {};
    });
}

}  // extern "C"
