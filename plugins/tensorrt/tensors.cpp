#include "tensors.h"

#include <limits>

namespace vq::trt {
namespace {

using contract::kBias;
using contract::kCodeLogits;
using contract::kCodes;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

bool Known(const Dims& dims) {
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] == kUnknown) return false;
    }
    return true;
}

}  // namespace

std::string Text(const Dims& dims) {
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    return text + "]";
}

Dims KnownDims(const nvinfer1::DimsExprs& exprs) {
    Dims dims{exprs.nbDims, {}};
    for (int32_t i = 0; i < exprs.nbDims; ++i) {
        dims.d[i] = exprs.d[i]->isConstant() ? exprs.d[i]->getConstantValue() : kUnknown;
    }
    return dims;
}

bool Agree(const Dims& found, const Dims& expected) {
    if (found.nbDims != expected.nbDims) return false;
    for (int32_t i = 0; i < found.nbDims; ++i) {
        if (found.d[i] != kUnknown && expected.d[i] != kUnknown && found.d[i] != expected.d[i]) return false;
    }
    return true;
}

std::string RefuseType(const char* name, DataType found, const char* expected) {
    return std::string(name) + " has the data type " + std::to_string(static_cast<int32_t>(found)) + ", expected " +
           expected;
}

std::string RefuseShape(const char* name, const Dims& found, const std::string& expected) {
    return std::string(name) + " has the shape " + Text(found) + ", expected " + expected;
}

std::string CheckCodeLogits(const GatherScatterFields& fields, const Dims& dims) {
    const char* name = contract::kGatherScatterInputs[kCodeLogits];
    if (dims.nbDims < 1 || dims.nbDims > Dims::MAX_DIMS) {
        return std::string(name) + " has rank " + std::to_string(dims.nbDims) + ", expected 1 to " +
               std::to_string(Dims::MAX_DIMS);
    }
    const int64_t width = dims.d[dims.nbDims - 1];
    if (width == kUnknown) return {};
    if (width < 1 || width % fields.num_codebooks != 0) {
        return RefuseShape(name, dims,
                           std::string("a last dimension that is a multiple of ") + contract::kNumCodebooks + ", " +
                               std::to_string(fields.num_codebooks));
    }
    GatherScatterShape shape = ShapeOf(fields, dims);
    if (!Known(dims)) shape.rows = 0;
    const std::string refusal = CheckShape(shape);
    return refusal.empty() ? refusal : std::string(name) + " has the shape " + Text(dims) + ": " + refusal;
}

std::optional<Type> TypeOf(DataType type) {
    // Not a switch: TensorRT adds types from one version to the next.
    if (type == DataType::kFLOAT) return Type::kFloat32;
    if (type == DataType::kHALF) return Type::kFloat16;
    if (type == DataType::kBF16) return Type::kBFloat16;
    return std::nullopt;
}

bool CountsFit(int32_t num_inputs, int32_t num_outputs) {
    return num_inputs >= kMinInputs && num_inputs <= kMaxInputs && num_outputs == kNumOutputs;
}

std::string CheckCounts(int32_t num_inputs, int32_t num_outputs) {
    if (CountsFit(num_inputs, num_outputs)) return {};
    return "there are " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
           " outputs, expected code_logits, codes and, optionally, bias, and one output";
}

std::string CheckTypes(const DataType* inputs, int32_t num_inputs) {
    const auto refuse = [&](int32_t i, const char* expected) {
        return RefuseType(contract::kGatherScatterInputs[i], inputs[i], expected);
    };
    if (!TypeOf(inputs[kCodeLogits])) return refuse(kCodeLogits, "FLOAT, HALF or BF16");
    if (inputs[kCodes] != DataType::kINT32) return refuse(kCodes, "INT32");
    if (num_inputs > kBias && inputs[kBias] != inputs[kCodeLogits]) return refuse(kBias, "that of code_logits");
    return {};
}

std::string CheckSizes(const GatherScatterFields& fields, const Dims* inputs, int32_t num_inputs, const Dims* logits) {
    std::string refusal = CheckCodeLogits(fields, inputs[kCodeLogits]);
    if (!refusal.empty()) return refusal;
    const Dims codes{2, {fields.num_codebooks, WordsPerCodebook(fields.vocab_size, fields.code_bits)}};
    if (!Agree(inputs[kCodes], codes)) {
        return RefuseShape(contract::kGatherScatterInputs[kCodes], inputs[kCodes],
                           Text(codes) + ": one row of words per codebook, for " + contract::kCodeBits + " " +
                               std::to_string(fields.code_bits) + " and " + contract::kVocabSize + " " +
                               std::to_string(fields.vocab_size));
    }
    const Dims bias{1, {fields.vocab_size}};
    if (num_inputs > kBias && !Agree(inputs[kBias], bias)) {
        return RefuseShape(contract::kGatherScatterInputs[kBias], inputs[kBias],
                           Text(bias) + ", one value per token of " + contract::kVocabSize);
    }
    if (logits == nullptr) return {};
    Dims expected = inputs[kCodeLogits];
    expected.d[expected.nbDims - 1] = fields.vocab_size;
    if (Agree(*logits, expected)) return {};
    return RefuseShape(contract::kGatherScatterOutputs[kLogits], *logits, Text(expected));
}

std::string CheckTensors(const GatherScatterFields& fields, const PluginTensorDesc* inputs, int32_t num_inputs,
                         const PluginTensorDesc& logits) {
    DataType types[kMaxInputs] = {};
    Dims dims[kMaxInputs] = {};
    for (int32_t i = 0; i < num_inputs; ++i) {
        types[i] = inputs[i].type;
        dims[i] = inputs[i].dims;
    }
    const std::string refusal = CheckTypes(types, num_inputs);
    if (!refusal.empty()) return refusal;
    if (logits.type != types[kCodeLogits]) {
        return RefuseType(contract::kGatherScatterOutputs[kLogits], logits.type, "that of code_logits");
    }
    return CheckSizes(fields, dims, num_inputs, &logits.dims);
}

GatherScatterShape ShapeOf(const GatherScatterFields& fields, const Dims& code_logits) {
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    const int32_t last = code_logits.nbDims - 1;
    int64_t rows = 1;
    for (int32_t i = 0; i < last; ++i) {
        const int64_t extent = code_logits.d[i];
        rows = extent > 0 && rows > kMax / extent ? kMax : rows * extent;
    }
    return {rows, fields.num_codebooks, code_logits.d[last] / fields.num_codebooks, fields.vocab_size};
}

}  // namespace vq::trt
