// The TensorRT plugin of VQGatherScatter: sizes and types from TensorRT's descriptors, then one launch.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "fields.h"

namespace vq::trt {

// inputs: code_logits T [.., M*K], codes int32 [M, WordsPerCodebook(V, code_bits)], optionally bias T [V]
// output: logits T [.., V]                                                            T is float32, float16 or bfloat16
//
// One object belongs to one network or execution context and shares nothing that changes with its clones, so any
// number of contexts and streams may run at once.
class VQGatherScatterPlugin final : public nvinfer1::IPluginV3,
                                    public nvinfer1::IPluginV3OneCore,
                                    public nvinfer1::IPluginV3OneBuild,
                                    public nvinfer1::IPluginV3OneRuntime {
public:
    explicit VQGatherScatterPlugin(const GatherScatterFields& fields, int32_t num_inputs = 0);
    VQGatherScatterPlugin(const VQGatherScatterPlugin&) = delete;  // serialized_ points into the object: see clone
    VQGatherScatterPlugin& operator=(const VQGatherScatterPlugin&) = delete;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, const nvinfer1::DataType* inputTypes,
                               int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs, const nvinfer1::DimsExprs* shapeInputs,
                            int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept override;
    const char* getTimingCacheID() noexcept override;
    const char* getMetadataString() noexcept override;

    // IPluginV3OneRuntime
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t nbInputs, const nvinfer1::PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDesc, const nvinfer1::PluginTensorDesc* outputDesc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    const GatherScatterFields fields_;
    const std::string description_;  // of the fields: timing-cache key and layer metadata
    const nvinfer1::PluginField serialized_[3];
    const nvinfer1::PluginFieldCollection serialized_collection_;
    // enqueue is not told whether there is a bias; onShapeChange is, and always comes first. 0: no shapes accepted yet.
    int32_t num_inputs_;
};

}  // namespace vq::trt
