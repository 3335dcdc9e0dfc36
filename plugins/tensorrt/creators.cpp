// The creator, and the library's two entry points. Nothing registers itself when the library is opened: who loads it
// through the plugin registry, trtexec or a plan would find the creator there already, and fail.
#include <string>

#include "gather_scatter_plugin.h"
#include "logging.h"
#include "vq/contract.h"

namespace vq::trt {
namespace {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginV3;
using nvinfer1::PluginFieldCollection;

class VQGatherScatterCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return contract::kGatherScatter; }
    const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return contract::kDomain; }
    const PluginFieldCollection* getFieldNames() noexcept override { return GatherScatterFieldNames(); }

    // Both phases take the same fields: node attributes to build, getFieldsToSerialize() from a plan.
    IPluginV3* createPlugin(const char* name, const PluginFieldCollection* collection,
                            nvinfer1::TensorRTPhase) noexcept override {
        constexpr char kWhere[] = "createPlugin";
        return Guard<IPluginV3*>(kWhere, nullptr, [&]() -> IPluginV3* {
            GatherScatterFields fields;
            const std::string refusal = ReadFields(collection, &fields);
            if (refusal.empty()) return new VQGatherScatterPlugin(fields);
            LogError(kWhere, ("node " + std::string(name == nullptr ? "" : name) + ": " + refusal).c_str());
            return nullptr;
        });
    }
};

}  // namespace
}  // namespace vq::trt

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators) {
    static vq::trt::VQGatherScatterCreator gather_scatter;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&gather_scatter};
    nbCreators = static_cast<int32_t>(std::size(creators));
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    vq::trt::SetLoggerFinder(finder);
}
