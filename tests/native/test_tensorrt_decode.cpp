// The plugins of VQTopK and VQSample as TensorRT leads them through their lives: with and without bias, what they say
// about their tensors, what they refuse and by which name, and that they launch nothing where there is nothing to do.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "tensorrt_host.h"

namespace {

using host::Create;
using host::DataType;
using host::Expressions;
using host::Fields;
using host::Library;
using host::Plugin;
using host::PluginFieldType;
using host::PluginTensorDesc;
using host::Tensor;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCreatorV3One;

constexpr DataType kF = DataType::kFLOAT, kT = DataType::kHALF, kI = DataType::kINT32, kL = DataType::kINT64;

// One op with its tensors for num_codebooks 2, code_bits 8, vocab_size 17, k 5 and code_logits [3, 1, 10].
struct Op {
    const char* name;
    std::vector<PluginTensorDesc> in;  // with bias, which is the third
    std::vector<PluginTensorDesc> out;
    std::vector<const char*> tensors;  // names of both
};

const Op kOps[] = {{"VQTopK",
                    {Tensor(kT, {3, 1, 10}), Tensor(kI, {2, 8}), Tensor(kT, {17})},
                    {Tensor(kF, {3, 1, 5}), Tensor(kL, {3, 1, 5}), Tensor(kF, {3, 1})},
                    {"code_logits", "codes", "bias", "values", "ids", "logsumexp"}},
                   {"VQSample",
                    {Tensor(kT, {3, 1, 10}), Tensor(kI, {2, 8}), Tensor(kT, {17}), Tensor(kF, {1}), Tensor(kF, {3, 1})},
                    {Tensor(kL, {3, 1}), Tensor(kF, {3, 1})},
                    {"code_logits", "codes", "bias", "temperature", "uniform", "ids", "logprob"}}};

bool IsTopK(const Op& op) { return op.out.size() == 3; }

std::unique_ptr<Fields> FieldsOf(const Op& op, int32_t k = 5) {
    auto fields = std::make_unique<Fields>(2, 8, 17);
    if (IsTopK(op)) fields->Add("k", PluginFieldType::kINT32, k);
    return fields;
}

std::vector<PluginTensorDesc> WithoutBias(const Op& op) {
    auto in = op.in;
    in.erase(in.begin() + 2);
    return in;
}

std::vector<DynamicPluginTensorDesc> Dynamic(const std::vector<PluginTensorDesc>& tensors) {
    std::vector<DynamicPluginTensorDesc> all(tensors.size());
    for (size_t i = 0; i < all.size(); ++i) {
        all[i].desc = tensors[i];
        all[i].min = all[i].opt = all[i].max = tensors[i].dims;
    }
    return all;
}

int32_t Configure(Plugin& plugin, const std::vector<PluginTensorDesc>& in, const std::vector<PluginTensorDesc>& out) {
    const auto inputs = Dynamic(in), outputs = Dynamic(out);
    return plugin.build->configurePlugin(inputs.data(), static_cast<int32_t>(in.size()), outputs.data(),
                                         static_cast<int32_t>(out.size()));
}

int32_t ChangeShapes(Plugin& plugin, const std::vector<PluginTensorDesc>& in,
                     const std::vector<PluginTensorDesc>& out) {
    return plugin.runtime->onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                         static_cast<int32_t>(out.size()));
}

void TestFields(Library& library, const Op& op, IPluginCreatorV3One* creator) {
    const auto* names = creator->getFieldNames();
    CHECK(names->nbFields == (IsTopK(op) ? 4 : 3), << names->nbFields);
    Plugin plugin(Create(creator, *FieldsOf(op)));
    CHECK(std::strcmp(plugin.core->getPluginName(), op.name) == 0 &&
          std::strcmp(plugin.core->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(plugin.core->getPluginNamespace(), "com.vqlogits") == 0);
    CHECK(host::FieldOf(plugin, "num_codebooks") == 2 && host::FieldOf(plugin, "code_bits") == 8 &&
          host::FieldOf(plugin, "vocab_size") == 17);
    CHECK(host::FieldOf(plugin, "k") == (IsTopK(op) ? 5 : -1));
    CHECK(std::string(plugin.build->getTimingCacheID()).find(op.name) == 0, << plugin.build->getTimingCacheID());
    if (!IsTopK(op)) return;
    Plugin other(Create(creator, *FieldsOf(op, 6)));
    CHECK(std::string(plugin.build->getTimingCacheID()) != other.build->getTimingCacheID());
    CHECK_QUIET(library);
    for (const int32_t k : {18, 257}) {  // V is 17
        CHECK(Plugin(Create(creator, *FieldsOf(op, k))).object == nullptr);
        CHECK_LOGGED(library, "VQTopK createPlugin: node node: field k is " + std::to_string(k) + ", expected 1 to 17");
    }
    Fields large(2, 8, 1000);
    large.Add("k", PluginFieldType::kINT64, int64_t{257});
    CHECK(Plugin(Create(creator, large)).object == nullptr);
    CHECK_LOGGED(library, "field k is 257, expected 1 to 256");
    Fields without(2, 8, 17);
    CHECK(Plugin(Create(creator, without)).object == nullptr);
    CHECK_LOGGED(library, "field k is missing");
}

void TestTypesAndFormats(Library& library, const Op& op, IPluginCreatorV3One* creator) {
    Plugin plugin(Create(creator, *FieldsOf(op)));
    CHECK(plugin.build->getNbOutputs() == static_cast<int32_t>(op.out.size()));
    for (const auto& in : {op.in, WithoutBias(op)}) {
        std::vector<DataType> types;
        for (const auto& tensor : in) types.push_back(tensor.type);
        std::vector<DataType> out(op.out.size(), DataType::kBOOL);
        const auto inputs = static_cast<int32_t>(in.size()), outputs = static_cast<int32_t>(out.size());
        CHECK(plugin.build->getOutputDataTypes(out.data(), outputs, types.data(), inputs) == 0);
        for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == op.out[i].type, << op.name << " output " << i);
        auto all = Dynamic(in);
        const auto more = Dynamic(op.out);
        all.insert(all.end(), more.begin(), more.end());
        for (int32_t pos = 0; pos < inputs + outputs; ++pos) {
            CHECK(plugin.build->supportsFormatCombination(pos, all.data(), inputs, outputs), << op.name << " " << pos);
            const PluginTensorDesc right = all[static_cast<size_t>(pos)].desc;
            all[static_cast<size_t>(pos)].desc.type = DataType::kINT8;
            CHECK(!plugin.build->supportsFormatCombination(pos, all.data(), inputs, outputs), << op.name << " " << pos);
            all[static_cast<size_t>(pos)].desc = right;
            all[static_cast<size_t>(pos)].desc.format = nvinfer1::TensorFormat::kCHW32;
            CHECK(!plugin.build->supportsFormatCombination(pos, all.data(), inputs, outputs), << op.name << " " << pos);
            all[static_cast<size_t>(pos)].desc = right;
        }
    }
    CHECK_QUIET(library);
    const DataType wrong[] = {kT, kI, kF, kF, kF};  // a bias of another type
    DataType out[3] = {};
    const auto inputs = static_cast<int32_t>(op.in.size()), outputs = static_cast<int32_t>(op.out.size());
    CHECK(plugin.build->getOutputDataTypes(out, outputs, wrong, inputs) != 0);
    CHECK_LOGGED(library, std::string(op.name) + " getOutputDataTypes: bias has the data type");
    CHECK(plugin.build->getOutputDataTypes(out, outputs, wrong, inputs + 1) != 0);
    CHECK_LOGGED(library, "there are " + std::to_string(inputs + 1) + " inputs");
}

void TestOutputShapes(Library& library, const Op& op, IPluginCreatorV3One* creator) {
    Plugin plugin(Create(creator, *FieldsOf(op)));
    for (const bool has_bias : {true, false}) {
        Expressions expressions;
        std::vector<DimsExprs> in = {expressions.Shape({-1, 4, 10}), expressions.Shape({2, 8})};
        if (has_bias) in.push_back(expressions.Shape({17}));
        if (!IsTopK(op)) {
            in.push_back(expressions.Shape({1}));
            in.push_back(expressions.Shape({-1, 4}));
        }
        DimsExprs out[3] = {};
        const auto inputs = static_cast<int32_t>(in.size()), outputs = static_cast<int32_t>(op.out.size());
        CHECK(plugin.build->getOutputShapes(in.data(), inputs, nullptr, 0, out, outputs, expressions) == 0);
        for (int32_t i = 0; i < outputs; ++i) {
            const bool of_k = IsTopK(op) && i < 2;
            CHECK(out[i].nbDims == (of_k ? 3 : 2), << op.name << " output " << i << " has rank " << out[i].nbDims);
            CHECK(out[i].d[0] == in[0].d[0] && out[i].d[1] == in[0].d[1]);
            if (of_k) CHECK(out[i].d[2]->isConstant() && out[i].d[2]->getConstantValue() == 5);
        }
        CHECK_QUIET(library);
        in[1] = expressions.Shape({17, 2});
        CHECK(plugin.build->getOutputShapes(in.data(), inputs, nullptr, 0, out, outputs, expressions) != 0);
        CHECK_LOGGED(library, "getOutputShapes: codes has the shape [17, 2], expected [2, 8]");
    }
}

// Every tensor in turn with a wrong type, then with a wrong shape: refused by its name, in both phases.
void TestRefusals(Library& library, const Op& op, IPluginCreatorV3One* creator) {
    Plugin plugin(Create(creator, *FieldsOf(op)));
    CHECK(Configure(plugin, op.in, op.out) == 0 && ChangeShapes(plugin, op.in, op.out) == 0);
    CHECK(Configure(plugin, WithoutBias(op), op.out) == 0 && ChangeShapes(plugin, WithoutBias(op), op.out) == 0);
    CHECK_QUIET(library);
    for (size_t i = 0; i < op.tensors.size(); ++i) {
        for (const bool type : {true, false}) {
            auto in = op.in, out = op.out;
            PluginTensorDesc& wrong = i < in.size() ? in[i] : out[i - in.size()];
            if (type) {
                wrong.type = DataType::kINT8;
            } else {
                wrong.dims.d[wrong.dims.nbDims - 1] += 1;
            }
            const std::string says = std::string(op.tensors[i]) + " has the " + (type ? "data type" : "shape");
            CHECK(Configure(plugin, in, out) != 0, << op.name << " " << says);
            CHECK_LOGGED(library, std::string(op.name) + " configurePlugin: " + says);
            CHECK(ChangeShapes(plugin, in, out) != 0, << op.name << " " << says);
            CHECK_LOGGED(library, std::string(op.name) + " onShapeChange: " + says);
        }
    }
}

int32_t Enqueue(Plugin& plugin, const std::vector<PluginTensorDesc>& in, const std::vector<PluginTensorDesc>& out) {
    alignas(16) static char memory[4096] = {};
    const std::vector<const void*> inputs(in.size(), memory);
    const std::vector<void*> outputs(out.size(), memory);
    return plugin.runtime->enqueue(in.data(), out.data(), inputs.data(), outputs.data(), memory, nullptr);
}

void TestEnqueue(Library& library, const Op& op, IPluginCreatorV3One* creator) {
    Plugin plugin(Create(creator, *FieldsOf(op)));
    auto in = op.in, out = op.out;
    for (auto* tensors : {&in, &out}) {  // no rows: nothing is launched, on any machine
        for (auto& tensor : *tensors) {
            if (tensor.dims.d[0] == 3) tensor.dims.d[0] = 0;
        }
    }
    CHECK(Enqueue(plugin, in, out) != 0);
    CHECK_LOGGED(library, "expected onShapeChange before enqueue");
    CHECK(ChangeShapes(plugin, in, out) == 0 && Enqueue(plugin, in, out) == 0);
    host::ResourceContext context;
    Plugin attached(plugin.runtime->attachToContext(&context)), clone(plugin.object->clone());
    CHECK(Enqueue(clone, in, out) == 0);  // as initialised as its original
    CHECK(attached.object != plugin.object && host::FieldOf(attached, "vocab_size") == 17);
    CHECK_QUIET(library);
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return;
    CHECK(ChangeShapes(plugin, op.in, op.out) == 0);
    CHECK(Enqueue(plugin, op.in, op.out) != 0);
    CHECK_LOGGED(library, std::string(op.name) + " enqueue: the launch returned cudaError");
}

// Enough for the largest shape is enough for every smaller one.
void TestWorkspace(Library& library, const Op& op, IPluginCreatorV3One* creator) {
    Plugin plugin(Create(creator, *FieldsOf(op)));
    size_t before = 0;
    for (const int64_t rows : {1, 3, 64, 4096}) {
        auto in = Dynamic(op.in);
        const auto out = Dynamic(op.out);
        in[0].desc.dims.d[0] = -1;
        in[0].max.d[0] = rows;
        const size_t bytes = plugin.build->getWorkspaceSize(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                                            static_cast<int32_t>(out.size()));
        CHECK(bytes > before, << op.name << " " << rows << " rows: " << bytes);
        before = bytes;
    }
    CHECK_QUIET(library);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: %s libvq_trt.so\n", argv[0]), 2;
    Library library(argv[1]);
    for (const Op& op : kOps) {
        IPluginCreatorV3One* creator = library.Find(op.name, "1", "com.vqlogits");
        CHECK(creator != nullptr, << op.name);
        if (creator == nullptr) continue;
        TestFields(library, op, creator);
        TestTypesAndFormats(library, op, creator);
        TestOutputShapes(library, op, creator);
        TestRefusals(library, op, creator);
        TestEnqueue(library, op, creator);
        TestWorkspace(library, op, creator);
    }
    return check::Done("tensorrt decode");
}
