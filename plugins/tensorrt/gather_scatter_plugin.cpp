#include "gather_scatter_plugin.h"

#include <optional>

#include "logging.h"
#include "tensors.h"
#include "vq/contract.h"
#include "vq/launch.h"

namespace vq::trt {
namespace {

using contract::kBias;
using contract::kCodeLogits;
using contract::kCodes;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

std::string Describe(const GatherScatterFields& fields) {
    return std::string(contract::kGatherScatter) + " " + contract::kPluginVersion + " " + contract::kNumCodebooks +
           "=" + std::to_string(fields.num_codebooks) + " " + contract::kCodeBits + "=" +
           std::to_string(fields.code_bits) + " " + contract::kVocabSize + "=" + std::to_string(fields.vocab_size);
}

}  // namespace

VQGatherScatterPlugin::VQGatherScatterPlugin(const GatherScatterFields& fields, int32_t num_inputs)
    : fields_(fields),
      description_(Describe(fields)),
      serialized_{{contract::kNumCodebooks, &fields_.num_codebooks, PluginFieldType::kINT32, 1},
                  {contract::kCodeBits, &fields_.code_bits, PluginFieldType::kINT32, 1},
                  {contract::kVocabSize, &fields_.vocab_size, PluginFieldType::kINT32, 1}},
      serialized_collection_{static_cast<int32_t>(std::size(serialized_)), serialized_},
      num_inputs_(num_inputs) {}

// --- IPluginV3 ---

nvinfer1::IPluginCapability* VQGatherScatterPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    LogError("getCapabilityInterface", "a capability that this plugin does not have was asked for");
    return nullptr;
}

nvinfer1::IPluginV3* VQGatherScatterPlugin::clone() noexcept {
    return Guard<nvinfer1::IPluginV3*>("clone", nullptr,
                                       [&] { return new VQGatherScatterPlugin(fields_, num_inputs_); });
}

// --- IPluginV3OneCore ---

const char* VQGatherScatterPlugin::getPluginName() const noexcept { return contract::kGatherScatter; }

const char* VQGatherScatterPlugin::getPluginVersion() const noexcept { return contract::kPluginVersion; }

const char* VQGatherScatterPlugin::getPluginNamespace() const noexcept { return contract::kDomain; }

// --- IPluginV3OneBuild ---

int32_t VQGatherScatterPlugin::getNbOutputs() const noexcept { return kNumOutputs; }

int32_t VQGatherScatterPlugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                                  int32_t nbInputs) const noexcept {
    constexpr char kWhere[] = "getOutputDataTypes";
    return Guard(kWhere, kFailure, [&] {
        std::string refusal = CheckCounts(nbInputs, nbOutputs);
        if (refusal.empty()) refusal = CheckTypes(inputTypes, nbInputs);
        if (refusal.empty()) outputTypes[kLogits] = inputTypes[kCodeLogits];
        return Report(kWhere, refusal);
    });
}

int32_t VQGatherScatterPlugin::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs*, int32_t,
                                               DimsExprs* outputs, int32_t nbOutputs,
                                               nvinfer1::IExprBuilder& exprBuilder) noexcept {
    constexpr char kWhere[] = "getOutputShapes";
    return Guard(kWhere, kFailure, [&] {
        std::string refusal = CheckCounts(nbInputs, nbOutputs);
        if (refusal.empty()) {
            Dims dims[kMaxInputs];
            for (int32_t i = 0; i < nbInputs; ++i) dims[i] = KnownDims(inputs[i]);
            refusal = CheckSizes(fields_, dims, nbInputs, nullptr);
        }
        if (refusal.empty()) {
            outputs[kLogits] = inputs[kCodeLogits];
            outputs[kLogits].d[outputs[kLogits].nbDims - 1] = exprBuilder.constant(fields_.vocab_size);
        }
        return Report(kWhere, refusal);
    });
}

bool VQGatherScatterPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut,
                                                      int32_t nbInputs, int32_t nbOutputs) noexcept {
    if (!CountsFit(nbInputs, nbOutputs) || pos < 0 || pos >= nbInputs + nbOutputs) return false;
    const PluginTensorDesc& tensor = inOut[pos].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (pos == kCodeLogits) return TypeOf(tensor.type).has_value();
    if (pos == kCodes) return tensor.type == DataType::kINT32;
    return tensor.type == inOut[kCodeLogits].desc.type;  // bias and logits
}

int32_t VQGatherScatterPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                               const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept {
    constexpr char kWhere[] = "configurePlugin";
    return Guard(kWhere, kFailure, [&] {
        std::string refusal = CheckCounts(nbInputs, nbOutputs);
        if (refusal.empty()) {
            PluginTensorDesc inputs[kMaxInputs];
            for (int32_t i = 0; i < nbInputs; ++i) inputs[i] = in[i].desc;
            refusal = CheckTensors(fields_, inputs, nbInputs, out[kLogits].desc);
        }
        return Report(kWhere, refusal);
    });
}

// What is timed depends on the fields too; TensorRT itself adds shapes and formats to the key.
const char* VQGatherScatterPlugin::getTimingCacheID() noexcept { return description_.c_str(); }

const char* VQGatherScatterPlugin::getMetadataString() noexcept { return description_.c_str(); }

// --- IPluginV3OneRuntime ---

nvinfer1::IPluginV3* VQGatherScatterPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return clone();
}

int32_t VQGatherScatterPlugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                                             int32_t nbOutputs) noexcept {
    constexpr char kWhere[] = "onShapeChange";
    num_inputs_ = 0;
    return Guard(kWhere, kFailure, [&] {
        std::string refusal = CheckCounts(nbInputs, nbOutputs);
        if (refusal.empty()) refusal = CheckTensors(fields_, in, nbInputs, out[kLogits]);
        if (refusal.empty()) num_inputs_ = nbInputs;
        return Report(kWhere, refusal);
    });
}

int32_t VQGatherScatterPlugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc*,
                                       const void* const* inputs, void* const* outputs, void*,
                                       cudaStream_t stream) noexcept {
    constexpr char kWhere[] = "enqueue";
    return Guard(kWhere, kFailure, [&] {
        if (num_inputs_ == 0) return Report(kWhere, "no shapes were accepted, expected onShapeChange before enqueue");
        const PluginTensorDesc& code_logits = inputDesc[kCodeLogits];
        const std::optional<Type> type = TypeOf(code_logits.type);
        if (!type) return Report(kWhere, "the data type of code_logits is none that onShapeChange accepts");
        GatherScatterArgs args{};
        args.code_logits = inputs[kCodeLogits];
        args.codes = inputs[kCodes];
        args.bias = num_inputs_ > kBias ? inputs[kBias] : nullptr;
        args.logits = outputs[kLogits];
        args.shape = ShapeOf(fields_, code_logits.dims);
        args.code_bits = fields_.code_bits;
        args.type = *type;
        const cudaError_t status = LaunchVQGatherScatter(args, stream);
        if (status == cudaSuccess) return kSuccess;
        return Report(
            kWhere, std::string("the launch returned ") + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
    });
}

const nvinfer1::PluginFieldCollection* VQGatherScatterPlugin::getFieldsToSerialize() noexcept {
    return &serialized_collection_;
}

}  // namespace vq::trt
