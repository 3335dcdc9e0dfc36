#include "sample_plugin.h"

#include "vq/contract.h"
#include "vq/launch.h"

namespace vq::trt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginFieldType;

VQSamplePlugin::VQSamplePlugin(const GatherScatterFields& fields) : DecodePlugin(contract::kSample), fields_(fields) {
    Serialize({{contract::kNumCodebooks, &fields_.num_codebooks, PluginFieldType::kINT32, 1},
               {contract::kCodeBits, &fields_.code_bits, PluginFieldType::kINT32, 1},
               {contract::kVocabSize, &fields_.vocab_size, PluginFieldType::kINT32, 1}});
}

std::vector<Expected> VQSamplePlugin::OtherInputs(const Dims& rows) const {
    return {{contract::kSampleInputs[contract::kTemperature], DataType::kFLOAT, Dims{1, {1}}},
            {contract::kSampleInputs[contract::kUniform], DataType::kFLOAT, rows}};
}

std::vector<Expected> VQSamplePlugin::Outputs(const Dims& rows) const {
    return {{contract::kSampleOutputs[0], DataType::kINT64, rows},
            {contract::kSampleOutputs[1], DataType::kFLOAT, rows}};
}

int64_t VQSamplePlugin::WorkspaceBytes(const GatherScatterShape& shape) const { return SampleWorkspaceBytes(shape); }

cudaError_t VQSamplePlugin::Launch(const Addresses& at, const GatherScatterShape& shape, Type type,
                                   cudaStream_t stream) const {
    SampleArgs args{};
    args.code_logits = at.code_logits;
    args.codes = at.codes;
    args.bias = at.bias;
    args.temperature = static_cast<const float*>(at.others[0]);
    args.uniform = static_cast<const float*>(at.others[1]);
    args.ids = static_cast<int64_t*>(at.outputs[0]);
    args.logprob = static_cast<float*>(at.outputs[1]);
    args.workspace = at.workspace;
    args.shape = shape;
    args.code_bits = fields_.code_bits;
    args.type = type;
    return LaunchVQSample(args, stream);
}

}  // namespace vq::trt
