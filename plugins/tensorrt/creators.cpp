// The creators, and the library's two entry points. Nothing registers itself when the library is opened: who loads it
// through the plugin registry, trtexec or a plan would find the creators there already, and fail.
#include <string>

#include "gather_scatter_plugin.h"
#include "logging.h"
#include "sample_plugin.h"
#include "top_k_plugin.h"
#include "vq/contract.h"

namespace vq::trt {
namespace {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginV3;
using nvinfer1::PluginFieldCollection;

// One op's creator. Op: kName, Fields, Plugin, Names() of its fields and Read() of what was given.
template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return Op::kName; }
    const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return contract::kDomain; }
    const PluginFieldCollection* getFieldNames() noexcept override { return Op::Names(); }

    // Both phases take the same fields: node attributes to build, getFieldsToSerialize() from a plan.
    IPluginV3* createPlugin(const char* name, const PluginFieldCollection* collection,
                            nvinfer1::TensorRTPhase) noexcept override {
        constexpr char kWhere[] = "createPlugin";
        return Guard<IPluginV3*>(
            kWhere, nullptr,
            [&]() -> IPluginV3* {
                typename Op::Fields fields;
                const std::string refusal = Op::Read(collection, &fields);
                if (refusal.empty()) return new typename Op::Plugin(fields);
                const std::string node = name == nullptr ? "" : name;
                LogError(kWhere, ("node " + node + ": " + refusal).c_str(), Op::kName);
                return nullptr;
            },
            Op::kName);
    }
};

struct GatherScatterOp {
    static constexpr const char* kName = contract::kGatherScatter;
    using Fields = GatherScatterFields;
    using Plugin = VQGatherScatterPlugin;
    static constexpr auto Names = &GatherScatterFieldNames;
    static constexpr auto Read = &ReadFields;
};

struct TopKOp {
    static constexpr const char* kName = contract::kTopK;
    using Fields = TopKFields;
    using Plugin = VQTopKPlugin;
    static constexpr auto Names = &TopKFieldNames;
    static constexpr auto Read = &ReadTopKFields;
};

struct SampleOp {
    static constexpr const char* kName = contract::kSample;
    using Fields = GatherScatterFields;
    using Plugin = VQSamplePlugin;
    static constexpr auto Names = &GatherScatterFieldNames;
    static constexpr auto Read = &ReadFields;
};

}  // namespace
}  // namespace vq::trt

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators) {
    static vq::trt::Creator<vq::trt::GatherScatterOp> gather_scatter;
    static vq::trt::Creator<vq::trt::TopKOp> top_k;
    static vq::trt::Creator<vq::trt::SampleOp> sample;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&gather_scatter, &top_k, &sample};
    nbCreators = static_cast<int32_t>(std::size(creators));
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    vq::trt::SetLoggerFinder(finder);
}
