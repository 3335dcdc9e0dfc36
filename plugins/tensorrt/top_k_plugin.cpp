#include "top_k_plugin.h"

#include "vq/contract.h"
#include "vq/launch.h"

namespace vq::trt {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

VQTopKPlugin::VQTopKPlugin(const TopKFields& fields) : DecodePlugin(contract::kTopK), fields_(fields) {
    Serialize({{contract::kNumCodebooks, &fields_.num_codebooks, PluginFieldType::kINT32, 1},
               {contract::kCodeBits, &fields_.code_bits, PluginFieldType::kINT32, 1},
               {contract::kVocabSize, &fields_.vocab_size, PluginFieldType::kINT32, 1},
               {contract::kNumBest, &fields_.num_best, PluginFieldType::kINT32, 1}});
}

std::vector<Expected> VQTopKPlugin::Outputs(const nvinfer1::Dims& rows) const {
    nvinfer1::Dims best = rows;
    best.d[best.nbDims++] = fields_.num_best;
    return {{contract::kTopKOutputs[0], DataType::kFLOAT, best},
            {contract::kTopKOutputs[1], DataType::kINT64, best},
            {contract::kTopKOutputs[2], DataType::kFLOAT, rows}};
}

int64_t VQTopKPlugin::WorkspaceBytes(const GatherScatterShape& shape) const {
    return TopKWorkspaceBytes(shape, fields_.num_best);
}

cudaError_t VQTopKPlugin::Launch(const Addresses& at, const GatherScatterShape& shape, Type type,
                                 cudaStream_t stream) const {
    TopKArgs args{};
    args.code_logits = at.code_logits;
    args.codes = at.codes;
    args.bias = at.bias;
    args.values = static_cast<float*>(at.outputs[0]);
    args.ids = static_cast<int64_t*>(at.outputs[1]);
    args.logsumexp = static_cast<float*>(at.outputs[2]);
    args.workspace = at.workspace;
    args.shape = shape;
    args.k = fields_.num_best;
    args.code_bits = fields_.code_bits;
    args.type = type;
    return LaunchVQTopK(args, stream);
}

}  // namespace vq::trt
