// What the plugins of VQTopK and VQSample share: everything but their tensors, their fields and their launch.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "fields.h"
#include "tensors.h"

namespace vq::trt {

// A tensor as an op wants it.
struct Expected {
    const char* name;
    nvinfer1::DataType type;
    nvinfer1::Dims dims;  // kUnknown where those of code_logits are not known yet
};

// Device memory of one enqueue; bias is null where there is none.
struct Addresses {
    const void* code_logits;
    const void* codes;
    const void* bias;
    const void* const* others;  // the inputs after bias
    void* const* outputs;
    void* workspace;
};

// Inputs: code_logits T [.., M*K], codes int32 [M, WordsPerCodebook(V, code_bits)], optionally bias T [V], then those
// of the op. The parser leaves a bias that is the empty string out, also in the middle, so the number of inputs tells.
//
// One object belongs to one network or execution context and shares nothing that changes with its clones, so any
// number of contexts and streams may run at once.
class DecodePlugin : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    DecodePlugin(const DecodePlugin&) = delete;  // serialized_ points into the object
    DecodePlugin& operator=(const DecodePlugin&) = delete;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
    nvinfer1::IPluginV3* clone() noexcept final;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept final;
    const char* getPluginVersion() const noexcept final;
    const char* getPluginNamespace() const noexcept final;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept final;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, const nvinfer1::DataType* inputTypes,
                               int32_t nbInputs) const noexcept final;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs, const nvinfer1::DimsExprs* shapeInputs,
                            int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept final;
    bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept final;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept final;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t nbOutputs) const noexcept final;
    const char* getTimingCacheID() noexcept final;
    const char* getMetadataString() noexcept final;

    // IPluginV3OneRuntime
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t nbInputs, const nvinfer1::PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept final;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDesc, const nvinfer1::PluginTensorDesc* outputDesc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept final;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final;

protected:
    explicit DecodePlugin(const char* name) : name_(name) {}

    // Sets the fields that a plan stores; the numbers must live as long as the object.
    void Serialize(std::vector<nvinfer1::PluginField> fields);

    virtual const GatherScatterFields& Head() const = 0;
    // The inputs after bias, and the outputs, for code_logits [.., M*K] of which `rows` are the leading dimensions.
    virtual std::vector<Expected> OtherInputs(const nvinfer1::Dims& rows) const = 0;
    virtual std::vector<Expected> Outputs(const nvinfer1::Dims& rows) const = 0;
    virtual int64_t WorkspaceBytes(const GatherScatterShape& shape) const = 0;
    virtual cudaError_t Launch(const Addresses& at, const GatherScatterShape& shape, Type type,
                               cudaStream_t stream) const = 0;
    virtual DecodePlugin* Copy() const = 0;

private:
    std::string CheckCounts(int32_t num_inputs, int32_t num_outputs) const;
    bool HasBias(int32_t num_inputs) const;
    // All inputs, then all outputs. Counts have been checked.
    std::vector<Expected> Tensors(nvinfer1::DataType type, const nvinfer1::Dims& code_logits, bool has_bias) const;
    std::string CheckTensors(const nvinfer1::DataType* types, const nvinfer1::Dims* dims, int32_t num_inputs,
                             int32_t num_outputs) const;
    template <typename Desc, typename Get>
    std::string CheckDescriptors(const Desc* in, int32_t num_inputs, const Desc* out, int32_t num_outputs,
                                 const Get& get) const;

    const char* const name_;
    std::string description_;  // of the fields: timing-cache key and layer metadata
    std::vector<nvinfer1::PluginField> serialized_;
    nvinfer1::PluginFieldCollection serialized_collection_{};
    // enqueue is not told whether there is a bias; onShapeChange is, and always comes first. 0: no shapes accepted yet.
    int32_t num_inputs_ = 0;
};

}  // namespace vq::trt
