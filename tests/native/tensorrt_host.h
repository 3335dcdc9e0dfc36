// The part of TensorRT that a plugin library sees, played on the host: its loader, logger, shape expressions and
// contexts. No TensorRT library is needed. One test program per subject includes this.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace host {

inline constexpr char kName[] = "VQGatherScatter", kVersion[] = "1", kNamespace[] = "com.vqlogits";

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

// Collects what the plugin logs, from any thread.
class Messages final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override { return this; }

    void log(Severity severity, const char* message) noexcept override {
        const std::lock_guard<std::mutex> lock(mutex_);
        CHECK(severity == Severity::kERROR, << message);
        messages_.emplace_back(message);
    }

    // All messages since the last call, and forgets them.
    std::vector<std::string> Take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return std::exchange(messages_, {});
    }

private:
    std::mutex mutex_;
    std::vector<std::string> messages_;
};

// The plugin library, opened the way IPluginRegistry::loadLibrary does it.
class Library {
public:
    explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) {
            std::fprintf(stderr, "%s\n", dlerror());
            std::exit(1);
        }
        set_logger_finder = reinterpret_cast<decltype(set_logger_finder)>(Symbol("setLoggerFinder"));
        get_creators = reinterpret_cast<decltype(get_creators)>(Symbol("getCreators"));
        if (set_logger_finder == nullptr || get_creators == nullptr) {
            std::fprintf(stderr, "%s lacks setLoggerFinder or getCreators\n", path);
            std::exit(1);
        }
        set_logger_finder(&messages);
    }

    void* Symbol(const char* name) const { return dlsym(handle_, name); }

    // The creator of this name, version and namespace, found the way the ONNX parser finds it; null: none.
    nvinfer1::IPluginCreatorV3One* Find(const char* name, const char* version, const char* domain) const {
        int32_t count = 0;
        nvinfer1::IPluginCreatorInterface* const* creators = get_creators(count);
        nvinfer1::IPluginCreatorV3One* found = nullptr;
        for (int32_t i = 0; i < count; ++i) {
            CHECK(std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, << "creator " << i);
            auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
            if (std::strcmp(creator->getPluginName(), name) != 0) continue;
            if (std::strcmp(creator->getPluginVersion(), version) != 0) continue;
            if (std::strcmp(creator->getPluginNamespace(), domain) == 0) found = creator;
        }
        return found;
    }

    // The creator under test, which is there.
    nvinfer1::IPluginCreatorV3One* Creator() const {
        nvinfer1::IPluginCreatorV3One* creator = Find(kName, kVersion, kNamespace);
        if (creator == nullptr) {
            std::fprintf(stderr, "the library has no creator %s, version %s, namespace %s\n", kName, kVersion,
                         kNamespace);
            std::exit(1);
        }
        return creator;
    }

    void (*set_logger_finder)(nvinfer1::ILoggerFinder*) = nullptr;
    nvinfer1::IPluginCreatorInterface* const* (*get_creators)(int32_t&) = nullptr;
    Messages messages;

private:
    void* handle_;
};

// A plugin and its capabilities; TensorRT destroys plugins with delete.
struct Plugin {
    explicit Plugin(nvinfer1::IPluginV3* made) : object(made) {
        if (made == nullptr) return;
        using nvinfer1::PluginCapabilityType;
        core = static_cast<nvinfer1::IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE));
        build = static_cast<nvinfer1::IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
        runtime =
            static_cast<nvinfer1::IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    }

    std::unique_ptr<nvinfer1::IPluginV3> object;
    nvinfer1::IPluginV3OneCore* core = nullptr;
    nvinfer1::IPluginV3OneBuild* build = nullptr;
    nvinfer1::IPluginV3OneRuntime* runtime = nullptr;
};

// Fields that own their data, as a parser or a plan holds them.
class Fields {
public:
    Fields() = default;
    Fields(int32_t num_codebooks, int32_t code_bits, int32_t vocab_size) {
        Add("num_codebooks", PluginFieldType::kINT32, num_codebooks);
        Add("code_bits", PluginFieldType::kINT32, code_bits);
        Add("vocab_size", PluginFieldType::kINT32, vocab_size);
    }

    template <typename Number>
    void Add(const char* name, PluginFieldType type, Number number, int32_t length = 1) {
        names_.emplace_back(name);
        // One byte in front: a field's data need not be aligned.
        data_.emplace_back(1 + sizeof(number));
        std::memcpy(data_.back().data() + 1, &number, sizeof(number));
        fields_.emplace_back(names_.back().c_str(), data_.back().data() + 1, type, length);
    }

    const PluginFieldCollection* Collection() {
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

private:
    std::deque<std::string> names_;
    std::deque<std::vector<char>> data_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_;
};

// The field of this name that the plugin would write into a plan; -1: none.
inline int32_t FieldOf(Plugin& plugin, const char* name) {
    const PluginFieldCollection* fields = plugin.runtime->getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        if (std::strcmp(fields->fields[i].name, name) != 0) continue;
        int32_t value = 0;
        std::memcpy(&value, fields->fields[i].data, sizeof(value));
        return value;
    }
    return -1;
}

inline nvinfer1::IPluginV3* Create(nvinfer1::IPluginCreatorV3One* creator, Fields& fields,
                                   nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
    return creator->createPlugin("node", fields.Collection(), phase);
}

inline Dims Shape(const std::vector<int64_t>& extents) {
    Dims dims{static_cast<int32_t>(extents.size()), {}};
    for (size_t i = 0; i < extents.size(); ++i) dims.d[i] = extents[i];
    return dims;
}

inline PluginTensorDesc Tensor(DataType type, const std::vector<int64_t>& extents) {
    return {Shape(extents), type, TensorFormat::kLINEAR, 1.0F};
}

// One extent of a shape: a constant, or a symbol (-1).
class Extent final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
public:
    explicit Extent(int64_t value) : value_(value) { mImpl = this; }

private:
    bool isConstant() const override { return value_ >= 0; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

    const int64_t value_;
};

// Owns the extents of one getOutputShapes call.
class Expressions final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
public:
    Expressions() { mImpl = this; }

    nvinfer1::DimsExprs Shape(const std::vector<int64_t>& values) {
        nvinfer1::DimsExprs shape{static_cast<int32_t>(values.size()), {}};
        for (size_t i = 0; i < values.size(); ++i) shape.d[i] = constant(values[i]);
        return shape;
    }

    using nvinfer1::IExprBuilder::constant;

private:
    const nvinfer1::IDimensionExpr* constant(int64_t value) override { return &extents_.emplace_back(value); }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                              const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }

    std::deque<Extent> extents_;
};

class ResourceContext final : public nvinfer1::IPluginResourceContext {
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

}  // namespace host

// The library logged one message since the last look, and it holds this text.
#define CHECK_LOGGED(library, text)                                              \
    do {                                                                         \
        const std::vector<std::string> logged_ = (library).messages.Take();      \
        CHECK(logged_.size() == 1 && logged_[0].find(text) != std::string::npos, \
              << "expected \"" << (text) << "\", logged " << logged_.size()      \
              << " messages: " << (logged_.empty() ? "" : logged_[0]));          \
    } while (false)

#define CHECK_QUIET(library)                                                \
    do {                                                                    \
        const std::vector<std::string> logged_ = (library).messages.Take(); \
        CHECK(logged_.empty(), << "logged: " << logged_[0]);                \
    } while (false)
