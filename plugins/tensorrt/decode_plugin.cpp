#include "decode_plugin.h"

#include <cstring>
#include <optional>

#include "logging.h"
#include "vq/contract.h"

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
using nvinfer1::PluginTensorDesc;

}  // namespace

void DecodePlugin::Serialize(std::vector<nvinfer1::PluginField> fields) {
    serialized_ = std::move(fields);
    serialized_collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    description_ = std::string(name_) + " " + contract::kPluginVersion;
    for (const nvinfer1::PluginField& field : serialized_) {
        int32_t value;
        std::memcpy(&value, field.data, sizeof(value));
        description_ += std::string(" ") + field.name + "=" + std::to_string(value);
    }
}

template <typename Desc, typename Get>
std::string DecodePlugin::CheckDescriptors(const Desc* in, int32_t num_inputs, const Desc* out, int32_t num_outputs,
                                           const Get& get) const {
    std::string refusal = CheckCounts(num_inputs, num_outputs);
    if (!refusal.empty()) return refusal;
    std::vector<DataType> types;
    std::vector<Dims> dims;
    for (int32_t i = 0; i < num_inputs + num_outputs; ++i) {
        const PluginTensorDesc& tensor = get(i < num_inputs ? in[i] : out[i - num_inputs]);
        types.push_back(tensor.type);
        dims.push_back(tensor.dims);
    }
    return CheckTensors(types.data(), dims.data(), num_inputs, num_outputs);
}

// --- IPluginV3 ---

nvinfer1::IPluginCapability* DecodePlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    LogError("getCapabilityInterface", "a capability that this plugin does not have was asked for", name_);
    return nullptr;
}

nvinfer1::IPluginV3* DecodePlugin::clone() noexcept {
    return Guard<nvinfer1::IPluginV3*>(
        "clone", nullptr,
        [&] {
            DecodePlugin* copy = Copy();
            copy->num_inputs_ = num_inputs_;
            return copy;
        },
        name_);
}

// --- IPluginV3OneCore ---

const char* DecodePlugin::getPluginName() const noexcept { return name_; }

const char* DecodePlugin::getPluginVersion() const noexcept { return contract::kPluginVersion; }

const char* DecodePlugin::getPluginNamespace() const noexcept { return contract::kDomain; }

// --- IPluginV3OneBuild ---

int32_t DecodePlugin::getNbOutputs() const noexcept {
    return Guard("getNbOutputs", 0, [&] { return static_cast<int32_t>(Outputs(Dims{0, {}}).size()); }, name_);
}

int32_t DecodePlugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                         int32_t nbInputs) const noexcept {
    constexpr char kWhere[] = "getOutputDataTypes";
    return Guard(
        kWhere, kFailure,
        [&] {
            std::string refusal = CheckCounts(nbInputs, nbOutputs);
            if (!refusal.empty()) return Report(kWhere, refusal, name_);
            // Shapes are not told here: those that are expected pass.
            const Dims code_logits{1, {kUnknown}};
            const std::vector<Expected> all = Tensors(inputTypes[kCodeLogits], code_logits, HasBias(nbInputs));
            std::vector<DataType> types(inputTypes, inputTypes + nbInputs);
            std::vector<Dims> dims;
            for (size_t i = 0; i < all.size(); ++i) {
                dims.push_back(all[i].dims);
                if (i >= types.size()) types.push_back(all[i].type);
            }
            refusal = CheckTensors(types.data(), dims.data(), nbInputs, nbOutputs);
            for (int32_t i = 0; refusal.empty() && i < nbOutputs; ++i)
                outputTypes[i] = types[static_cast<size_t>(nbInputs + i)];
            return Report(kWhere, refusal, name_);
        },
        name_);
}

int32_t DecodePlugin::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs*, int32_t,
                                      DimsExprs* outputs, int32_t nbOutputs,
                                      nvinfer1::IExprBuilder& exprBuilder) noexcept {
    constexpr char kWhere[] = "getOutputShapes";
    return Guard(
        kWhere, kFailure,
        [&] {
            std::string refusal = CheckCounts(nbInputs, nbOutputs);
            if (!refusal.empty()) return Report(kWhere, refusal, name_);
            // Types are not told here.
            const Dims code_logits = KnownDims(inputs[kCodeLogits]);
            refusal = CheckCodeLogits(Head(), code_logits);
            if (!refusal.empty()) return Report(kWhere, refusal, name_);
            const std::vector<Expected> all = Tensors(DataType::kFLOAT, code_logits, HasBias(nbInputs));
            for (int32_t i = kCodes; i < nbInputs; ++i) {
                const Expected& want = all[static_cast<size_t>(i)];
                const Dims found = KnownDims(inputs[i]);
                if (!Agree(found, want.dims)) {
                    return Report(kWhere, RefuseShape(want.name, found, Text(want.dims)), name_);
                }
            }
            const int32_t rows = code_logits.nbDims - 1;
            for (int32_t i = 0; i < nbOutputs; ++i) {
                const Dims& want = all[static_cast<size_t>(nbInputs + i)].dims;
                outputs[i].nbDims = want.nbDims;
                for (int32_t d = 0; d < want.nbDims; ++d) {
                    // The very expressions of the leading dimensions, so that TensorRT sees that they are equal.
                    outputs[i].d[d] = d < rows ? inputs[kCodeLogits].d[d] : exprBuilder.constant(want.d[d]);
                }
            }
            return kSuccess;
        },
        name_);
}

bool DecodePlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                             int32_t nbOutputs) noexcept {
    return Guard(
        "supportsFormatCombination", false,
        [&] {
            if (!CheckCounts(nbInputs, nbOutputs).empty() || pos < 0 || pos >= nbInputs + nbOutputs) return false;
            const PluginTensorDesc& tensor = inOut[pos].desc;
            if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
            if (pos == kCodeLogits) return TypeOf(tensor.type).has_value();
            const Dims code_logits{1, {kUnknown}};
            const auto all = Tensors(inOut[kCodeLogits].desc.type, code_logits, HasBias(nbInputs));
            return tensor.type == all[static_cast<size_t>(pos)].type;
        },
        name_);
}

int32_t DecodePlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                      const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept {
    constexpr char kWhere[] = "configurePlugin";
    return Guard(
        kWhere, kFailure,
        [&] {
            const auto get = [](const DynamicPluginTensorDesc& tensor) -> const PluginTensorDesc& {
                return tensor.desc;
            };
            return Report(kWhere, CheckDescriptors(in, nbInputs, out, nbOutputs, get), name_);
        },
        name_);
}

size_t DecodePlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                                      const DynamicPluginTensorDesc*, int32_t) const noexcept {
    return Guard<size_t>(
        "getWorkspaceSize", 0,
        [&]() -> size_t {
            if (nbInputs <= kCodeLogits) return 0;
            const Dims& most = inputs[kCodeLogits].max;
            if (!CheckCodeLogits(Head(), most).empty()) return 0;  // configurePlugin refuses it
            return static_cast<size_t>(WorkspaceBytes(ShapeOf(Head(), most)));
        },
        name_);
}

// What is timed depends on the fields too; TensorRT itself adds shapes and formats to the key.
const char* DecodePlugin::getTimingCacheID() noexcept { return description_.c_str(); }

const char* DecodePlugin::getMetadataString() noexcept { return description_.c_str(); }

// --- IPluginV3OneRuntime ---

nvinfer1::IPluginV3* DecodePlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

int32_t DecodePlugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                                    int32_t nbOutputs) noexcept {
    constexpr char kWhere[] = "onShapeChange";
    num_inputs_ = 0;
    return Guard(
        kWhere, kFailure,
        [&] {
            const auto get = [](const PluginTensorDesc& tensor) -> const PluginTensorDesc& { return tensor; };
            const std::string refusal = CheckDescriptors(in, nbInputs, out, nbOutputs, get);
            if (refusal.empty()) num_inputs_ = nbInputs;
            return Report(kWhere, refusal, name_);
        },
        name_);
}

int32_t DecodePlugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc*, const void* const* inputs,
                              void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    constexpr char kWhere[] = "enqueue";
    return Guard(
        kWhere, kFailure,
        [&] {
            if (num_inputs_ == 0) {
                return Report(kWhere, "no shapes were accepted, expected onShapeChange before enqueue", name_);
            }
            const PluginTensorDesc& code_logits = inputDesc[kCodeLogits];
            const std::optional<Type> type = TypeOf(code_logits.type);
            if (!type) {
                return Report(kWhere, "the data type of code_logits is none that onShapeChange accepts", name_);
            }
            const bool has_bias = HasBias(num_inputs_);
            const Addresses at{inputs[kCodeLogits],
                               inputs[kCodes],
                               has_bias ? inputs[kBias] : nullptr,
                               inputs + kBias + (has_bias ? 1 : 0),
                               outputs,
                               workspace};
            const cudaError_t status = Launch(at, ShapeOf(Head(), code_logits.dims), *type, stream);
            if (status == cudaSuccess) return kSuccess;
            return Report(
                kWhere,
                std::string("the launch returned ") + cudaGetErrorName(status) + ", " + cudaGetErrorString(status),
                name_);
        },
        name_);
}

const nvinfer1::PluginFieldCollection* DecodePlugin::getFieldsToSerialize() noexcept { return &serialized_collection_; }

}  // namespace vq::trt
