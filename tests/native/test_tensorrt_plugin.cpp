// The life of a plugin object as TensorRT leads it: found, created, cloned, attached to contexts, used from several
// threads, destroyed.
#include <cuda_runtime_api.h>

#include <thread>

#include "tensorrt_host.h"

namespace {

using host::Create;
using host::DataType;
using host::Fields;
using host::Library;
using host::Plugin;
using host::PluginFieldType;
using host::Tensor;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::PluginFieldCollection;
using nvinfer1::TensorRTPhase;

void TestCreator(const Library& library, IPluginCreatorV3One* creator) {
    CHECK(library.Find(host::kName, host::kVersion, "") == nullptr);
    CHECK(library.Find(host::kName, "2", host::kNamespace) == nullptr);
    // The deprecated entry point is taken for the one of a library of IPluginCreator objects, which this is not.
    CHECK(library.Symbol("getPluginCreators") == nullptr);
    const PluginFieldCollection* names = creator->getFieldNames();
    const char* expected[] = {"num_codebooks", "code_bits", "vocab_size"};
    CHECK(names->nbFields == 3, << names->nbFields);
    for (int32_t i = 0; i < 3; ++i) {
        CHECK(std::strcmp(names->fields[i].name, expected[i]) == 0, << names->fields[i].name);
        CHECK(names->fields[i].type == PluginFieldType::kINT32 && names->fields[i].length == 1, << expected[i]);
    }
}

void TestCapabilities(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(3, 16, 1000), other(3, 16, 1001);
    Plugin plugin(Create(creator, fields)), same(Create(creator, fields)), different(Create(creator, other));
    CHECK(plugin.core != nullptr && plugin.build != nullptr && plugin.runtime != nullptr);
    CHECK(std::strcmp(plugin.object->getInterfaceInfo().kind, "PLUGIN") == 0);
    CHECK(std::strcmp(plugin.core->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE") == 0);
    CHECK(std::strcmp(plugin.build->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD") == 0);
    CHECK(std::strcmp(plugin.runtime->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME") == 0);
    CHECK(std::strcmp(plugin.core->getPluginName(), host::kName) == 0);
    CHECK(std::strcmp(plugin.core->getPluginVersion(), host::kVersion) == 0);
    CHECK(std::strcmp(plugin.core->getPluginNamespace(), host::kNamespace) == 0);
    CHECK(plugin.build->getNbOutputs() == 1);
    CHECK(plugin.build->getNbTactics() == 0);
    CHECK(plugin.build->getWorkspaceSize(nullptr, 0, nullptr, 0) == 0);
    CHECK(plugin.runtime->setTactic(0) == 0);
    const std::string id = plugin.build->getTimingCacheID();
    CHECK(id == same.build->getTimingCacheID(), << id);
    CHECK(id != different.build->getTimingCacheID(), << id);
    CHECK(id == plugin.build->getMetadataString(), << id);
    CHECK_QUIET(library);
    CHECK(plugin.object->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(3)) == nullptr);
    CHECK_LOGGED(library, "getCapabilityInterface");
}

const std::vector<host::PluginTensorDesc> kInputs = {Tensor(DataType::kHALF, {0, 10}),
                                                     Tensor(DataType::kINT32, {2, 4})};
const host::PluginTensorDesc kOutput = Tensor(DataType::kHALF, {0, 7});

// With no rows, enqueue launches nothing, so that its answer shows the state of the object on any machine.
int32_t EnqueueNothing(Plugin& plugin) {
    const void* inputs[] = {nullptr, nullptr};
    void* outputs[] = {nullptr};
    return plugin.runtime->enqueue(kInputs.data(), &kOutput, inputs, outputs, nullptr, nullptr);
}

void TestClones(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(2, 8, 7);
    auto original = std::make_unique<Plugin>(Create(creator, fields));
    Plugin clone(original->object->clone());
    host::ResourceContext context;
    Plugin attached(original->runtime->attachToContext(&context));
    CHECK(attached.object != nullptr && attached.object != original->object && clone.object != original->object);
    CHECK(clone.runtime->getFieldsToSerialize()->fields[0].data !=
          original->runtime->getFieldsToSerialize()->fields[0].data);

    // Shapes told to one context are not told to another.
    CHECK(attached.runtime->onShapeChange(kInputs.data(), 2, &kOutput, 1) == 0);
    CHECK(EnqueueNothing(attached) == 0);
    CHECK_QUIET(library);
    CHECK(EnqueueNothing(clone) != 0);
    CHECK_LOGGED(library, "expected onShapeChange before enqueue");
    CHECK(EnqueueNothing(*original) != 0);
    CHECK_LOGGED(library, "expected onShapeChange before enqueue");

    original.reset();  // clones outlive what they were made from
    CHECK(host::FieldOf(clone, "num_codebooks") == 2 && host::FieldOf(clone, "code_bits") == 8 &&
          host::FieldOf(clone, "vocab_size") == 7);
    CHECK(std::string(clone.build->getTimingCacheID()) == attached.build->getTimingCacheID());
    // A clone is as initialised as its original.
    Plugin again(attached.object->clone());
    CHECK(EnqueueNothing(again) == 0);
    // Shapes that were refused are not run with what was accepted before.
    CHECK(attached.runtime->onShapeChange(kInputs.data(), 1, &kOutput, 1) != 0);
    CHECK_LOGGED(library, "there are 1 inputs");
    CHECK(EnqueueNothing(attached) != 0);
    CHECK_LOGGED(library, "expected onShapeChange before enqueue");
}

void TestThreads(Library& library, IPluginCreatorV3One* creator) {
    constexpr int kThreads = 8, kRounds = 200;
    Fields shared_fields(2, 8, 7);
    shared_fields.Collection();
    Plugin shared(Create(creator, shared_fields));  // an engine's plugin, from which every context takes its own
    std::vector<std::string> wrong[kThreads];
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            host::ResourceContext context;
            for (int i = 0; i < kRounds; ++i) {
                Fields mine(t + 1, 8, i + 1), bad(t + 1, 8, -i);
                Plugin plugin(Create(creator, mine)), attached(shared.runtime->attachToContext(&context));
                const bool held = host::FieldOf(plugin, "num_codebooks") == t + 1 &&
                                  host::FieldOf(plugin, "vocab_size") == i + 1 &&
                                  attached.runtime->onShapeChange(kInputs.data(), 2, &kOutput, 1) == 0 &&
                                  EnqueueNothing(attached) == 0 && Create(creator, bad) == nullptr;
                if (!held) wrong[t].push_back("thread " + std::to_string(t) + " round " + std::to_string(i));
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<std::string>& each : wrong) CHECK(each.empty(), << each[0]);
    const size_t logged = library.messages.Take().size();
    CHECK(logged == kThreads * kRounds, << logged);
}

// A launch that fails is an error with CUDA's own words, never a crash; every machine without a GPU can show it.
void TestFailedLaunch(Library& library, IPluginCreatorV3One* creator) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) {
        std::printf("failed launch: skipped, there is a GPU and nothing fails\n");
        return;
    }
    Fields fields(2, 8, 7);
    Plugin plugin(Create(creator, fields));
    const host::PluginTensorDesc in[] = {Tensor(DataType::kFLOAT, {1, 10}), kInputs[1]};
    const host::PluginTensorDesc out = Tensor(DataType::kFLOAT, {1, 7});
    alignas(16) char memory[3][64] = {};
    const void* inputs[] = {memory[0], memory[1]};
    void* outputs[] = {memory[2]};
    CHECK(plugin.runtime->onShapeChange(in, 2, &out, 1) == 0);
    CHECK(plugin.runtime->enqueue(in, &out, inputs, outputs, nullptr, nullptr) != 0);
    CHECK_LOGGED(library, "enqueue: the launch returned cudaError");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: %s libvq_trt.so\n", argv[0]), 2;
    Library library(argv[1]);
    IPluginCreatorV3One* creator = library.Creator();
    TestCreator(library, creator);
    TestCapabilities(library, creator);
    TestClones(library, creator);
    TestThreads(library, creator);
    TestFailedLaunch(library, creator);
    return check::Done("tensorrt plugin");
}
