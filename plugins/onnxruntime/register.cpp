// RegisterCustomOps: what ONNX Runtime calls when the library is given to a session.
#include "gather_scatter_op.h"
#include "sample_op.h"
#include "top_k_op.h"
#ifdef VQ_HAS_CUDA
#include "decode_cuda_op.h"
#include "gather_scatter_cuda_op.h"
#endif

namespace {

constexpr ONNXTensorElementDataType kElements[] = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

template <typename Op>
void AddOps(Ort::CustomOpDomain& domain) {
    for (const auto element : kElements) domain.Add(new Op(element));
}

// Domain and ops are never freed: sessions keep pointers to them, and may outlive this library's own objects at exit.
OrtCustomOpDomain* Domain() {
    static OrtCustomOpDomain* const domain = [] {
        Ort::CustomOpDomain made{vq::contract::kDomain};
        AddOps<vq::ort::GatherScatterOp>(made);
        AddOps<vq::ort::TopKOp>(made);
        AddOps<vq::ort::SampleOp>(made);
#ifdef VQ_HAS_CUDA
        AddOps<vq::ort::GatherScatterCudaOp>(made);
        AddOps<vq::ort::TopKCudaOp>(made);
        AddOps<vq::ort::SampleCudaOp>(made);
#endif
        return made.release();
    }();
    return domain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(vq::ort::kApiVersion);
    if (api == nullptr) {
        return base->GetApi(1)->CreateStatus(
            ORT_NOT_IMPLEMENTED,
            (std::string("libvq_ort.so needs ONNX Runtime 1.22 or newer, this is ") + base->GetVersionString())
                .c_str());
    }
    Ort::InitApi(api);
    try {
        return api->AddCustomOpDomain(options, Domain());
    } catch (const std::exception& error) {
        return api->CreateStatus(ORT_FAIL, error.what());
    }
}
