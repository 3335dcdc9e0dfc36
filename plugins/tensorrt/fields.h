// The plugins' fields: node attributes at build time, what a plan stores at run time. The same in both phases.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace vq::trt {

struct GatherScatterFields {
    int32_t num_codebooks = 0;  // M
    int32_t code_bits = 0;      // 8 or 16
    int32_t vocab_size = 0;     // V
};

// Names and types for IPluginCreatorV3One::getFieldNames: the parser copies node attributes of these names.
const nvinfer1::PluginFieldCollection* GatherScatterFieldNames();

// Fields of either integer type, in any order; those with other names are left alone.
//
// Returns: empty, or one sentence about the first missing, duplicate, mistyped or out-of-range field.
std::string ReadFields(const nvinfer1::PluginFieldCollection* collection, GatherScatterFields* fields);

// VQTopK's fields; those of VQSample are GatherScatterFields.
struct TopKFields : GatherScatterFields {
    int32_t num_best = 0;  // k
};

const nvinfer1::PluginFieldCollection* TopKFieldNames();

// As above; k must be 1 to contract::kMaxBest and at most V.
std::string ReadTopKFields(const nvinfer1::PluginFieldCollection* collection, TopKFields* fields);

}  // namespace vq::trt
