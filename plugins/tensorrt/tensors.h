// What TensorRT's descriptors say about the tensors of one op.
#pragma once

#include <NvInferRuntime.h>

#include <optional>
#include <string>

#include "fields.h"
#include "vq/contract.h"
#include "vq/shape.h"

namespace vq::trt {

inline constexpr int32_t kLogits = 0;  // the only output
inline constexpr int32_t kNumOutputs = 1;
inline constexpr int32_t kMinInputs = contract::kCodes + 1;
inline constexpr int32_t kMaxInputs = contract::kBias + 1;
inline constexpr int64_t kUnknown = -1;  // an extent that is not known yet: it agrees with any

// T of the op, or nothing for a type that it does not take.
std::optional<Type> TypeOf(nvinfer1::DataType type);

// Whether there is a place for each tensor: the one check that must come before any descriptor is read.
bool CountsFit(int32_t num_inputs, int32_t num_outputs);

// The checks below return an empty text, or one sentence that names what was found and what was expected.
std::string CheckCounts(int32_t num_inputs, int32_t num_outputs);

// T code_logits, int32 codes, T bias. Counts have been checked.
std::string CheckTypes(const nvinfer1::DataType* inputs, int32_t num_inputs);

// code_logits [.., M*K], codes [M, WordsPerCodebook(V, code_bits)], bias [V] if there is a third input, logits [.., V].
//
// Args: inputs, the dimensions of num_inputs tensors; logits, those of the output, or null where they are not known.
std::string CheckSizes(const GatherScatterFields& fields, const nvinfer1::Dims* inputs, int32_t num_inputs,
                       const nvinfer1::Dims* logits);

// Types and sizes of all tensors. Counts have been checked.
std::string CheckTensors(const GatherScatterFields& fields, const nvinfer1::PluginTensorDesc* inputs,
                         int32_t num_inputs, const nvinfer1::PluginTensorDesc& logits);

// The first input of every op: [.., M*K].
std::string CheckCodeLogits(const GatherScatterFields& fields, const nvinfer1::Dims& dims);

// Whether two shapes can be the same, as far as they are known.
bool Agree(const nvinfer1::Dims& found, const nvinfer1::Dims& expected);

// "[2, -1]".
std::string Text(const nvinfer1::Dims& dims);

// Dimensions while an engine is built: kUnknown where they are not constants.
nvinfer1::Dims KnownDims(const nvinfer1::DimsExprs& exprs);

// One sentence about a tensor that is not as expected.
std::string RefuseType(const char* name, nvinfer1::DataType found, const char* expected);
std::string RefuseShape(const char* name, const nvinfer1::Dims& found, const std::string& expected);

// Sizes of the op for code_logits [.., M*K] of known dimensions that passed; too many rows saturate.
GatherScatterShape ShapeOf(const GatherScatterFields& fields, const nvinfer1::Dims& code_logits);

}  // namespace vq::trt
