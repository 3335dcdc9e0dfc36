// What the tensors of VQTopK and VQSample must be.
#include <cstring>

#include "decode_plugin.h"
#include "vq/contract.h"

namespace vq::trt {
namespace {

using contract::kBias;
using contract::kCodeLogits;
using contract::kCodes;
using nvinfer1::DataType;
using nvinfer1::Dims;

// The leading dimensions of [.., M*K].
Dims RowsOf(Dims code_logits) {
    if (code_logits.nbDims > 0) --code_logits.nbDims;
    return code_logits;
}

const char* NameOf(DataType type) {
    switch (type) {
        case DataType::kINT32:
            return "INT32";
        case DataType::kINT64:
            return "INT64";
        default:
            return "FLOAT";
    }
}

}  // namespace

bool DecodePlugin::HasBias(int32_t num_inputs) const {
    return num_inputs > kBias + static_cast<int32_t>(OtherInputs(Dims{0, {}}).size());
}

std::string DecodePlugin::CheckCounts(int32_t num_inputs, int32_t num_outputs) const {
    const auto others = static_cast<int32_t>(OtherInputs(Dims{0, {}}).size());
    const auto outputs = static_cast<int32_t>(Outputs(Dims{0, {}}).size());
    const bool inputs_fit = num_inputs == kBias + others || num_inputs == kBias + 1 + others;
    if (inputs_fit && num_outputs == outputs) return {};
    return "there are " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
           " outputs, expected " + std::to_string(kBias + others) + " inputs, or one more with bias, and " +
           std::to_string(outputs) + " outputs";
}

std::vector<Expected> DecodePlugin::Tensors(DataType type, const Dims& code_logits, bool has_bias) const {
    const GatherScatterFields& head = Head();
    const Dims codes{2, {head.num_codebooks, WordsPerCodebook(head.vocab_size, head.code_bits)}};
    std::vector<Expected> all = {{contract::kTopKInputs[kCodeLogits], type, code_logits},
                                 {contract::kTopKInputs[kCodes], DataType::kINT32, codes}};
    if (has_bias) all.push_back({contract::kTopKInputs[kBias], type, Dims{1, {head.vocab_size}}});
    const Dims rows = RowsOf(code_logits);
    for (const auto& more : {OtherInputs(rows), Outputs(rows)}) all.insert(all.end(), more.begin(), more.end());
    return all;
}

std::string DecodePlugin::CheckTensors(const DataType* types, const Dims* dims, int32_t num_inputs,
                                       int32_t num_outputs) const {
    if (!TypeOf(types[kCodeLogits])) {
        return RefuseType(contract::kTopKInputs[kCodeLogits], types[kCodeLogits], "FLOAT, HALF or BF16");
    }
    std::string refusal = CheckCodeLogits(Head(), dims[kCodeLogits]);
    if (!refusal.empty()) return refusal;
    const std::vector<Expected> all = Tensors(types[kCodeLogits], dims[kCodeLogits], HasBias(num_inputs));
    for (int32_t i = kCodes; i < num_inputs + num_outputs; ++i) {
        const Expected& want = all[static_cast<size_t>(i)];
        if (types[i] != want.type) {
            const bool is_bias = std::strcmp(want.name, contract::kTopKInputs[kBias]) == 0;
            return RefuseType(want.name, types[i], is_bias ? "that of code_logits" : NameOf(want.type));
        }
        if (!Agree(dims[i], want.dims)) return RefuseShape(want.name, dims[i], Text(want.dims));
    }
    return {};
}

}  // namespace vq::trt
