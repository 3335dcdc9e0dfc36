#include "capi/decode_cuda.h"

#ifdef VQ_HAS_CUDA

#include <memory>
#include <new>

#include "device_buckets.h"

namespace {

vq::DeviceBuckets Of(const void* buckets) {
    return buckets == nullptr ? vq::DeviceBuckets{} : static_cast<const vq::OwnedBuckets*>(buckets)->get();
}

}  // namespace

extern "C" {

int vq_make_buckets_cuda(const int32_t* codes, const float* bias, int64_t vocab_size, void** made) {
    try {
        auto buckets = std::make_unique<vq::OwnedBuckets>();
        const cudaError_t status = buckets->Upload(vq::BuildBuckets(codes, bias, vocab_size));
        if (status == cudaSuccess) *made = buckets.release();
        return status;
    } catch (const std::bad_alloc&) {
        return cudaErrorMemoryAllocation;
    }
}

void vq_free_buckets_cuda(void* buckets) { delete static_cast<vq::OwnedBuckets*>(buckets); }

int64_t vq_top_k_workspace_cuda(int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size, int64_t k) {
    return vq::TopKWorkspaceBytes({rows, num_codebooks, num_codes, vocab_size}, k);
}

int64_t vq_sample_workspace_cuda(int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size) {
    return vq::SampleWorkspaceBytes({rows, num_codebooks, num_codes, vocab_size});
}

int vq_top_k_cuda(const void* code_logits, const void* codes, const void* bias, float* values, int64_t* ids,
                  float* logsumexp, void* workspace, int64_t rows, int64_t num_codebooks, int64_t num_codes,
                  int64_t vocab_size, int64_t k, int32_t code_bits, int32_t type, const void* buckets, void* stream) {
    return vq::LaunchVQTopK({code_logits,
                             codes,
                             bias,
                             values,
                             ids,
                             logsumexp,
                             workspace,
                             {rows, num_codebooks, num_codes, vocab_size},
                             k,
                             code_bits,
                             static_cast<vq::Type>(type),
                             Of(buckets)},
                            static_cast<cudaStream_t>(stream));
}

int vq_sample_cuda(const void* code_logits, const void* codes, const void* bias, const float* temperature,
                   const float* uniform, int64_t* ids, float* logprob, void* workspace, int64_t rows,
                   int64_t num_codebooks, int64_t num_codes, int64_t vocab_size, int32_t code_bits, int32_t type,
                   const void* buckets, void* stream) {
    return vq::LaunchVQSample({code_logits,
                               codes,
                               bias,
                               temperature,
                               uniform,
                               ids,
                               logprob,
                               workspace,
                               {rows, num_codebooks, num_codes, vocab_size},
                               code_bits,
                               static_cast<vq::Type>(type),
                               Of(buckets)},
                              static_cast<cudaStream_t>(stream));
}

}  // extern "C"

#else

namespace {
constexpr int kNotSupported = 801;
}

extern "C" {

int vq_make_buckets_cuda(const int32_t*, const float*, int64_t, void**) { return kNotSupported; }

void vq_free_buckets_cuda(void*) {}

int64_t vq_top_k_workspace_cuda(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }

int64_t vq_sample_workspace_cuda(int64_t, int64_t, int64_t, int64_t) { return 0; }

int vq_top_k_cuda(const void*, const void*, const void*, float*, int64_t*, float*, void*, int64_t, int64_t, int64_t,
                  int64_t, int64_t, int32_t, int32_t, const void*, void*) {
    return kNotSupported;
}

int vq_sample_cuda(const void*, const void*, const void*, const float*, const float*, int64_t*, float*, void*, int64_t,
                   int64_t, int64_t, int64_t, int32_t, int32_t, const void*, void*) {
    return kNotSupported;
}

}  // extern "C"

#endif
