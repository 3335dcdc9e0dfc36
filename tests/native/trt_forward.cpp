// A TensorRT without a GPU, for tests: NVIDIA's Python bindings of TensorRT over the libraries of TensorRT for RTX.
// This library goes by the name libnvinfer.so.11, which the bindings ask for; its entry points hand on to the RTX
// libraries, with the version number that those accept in place of the one that the bindings pass.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr std::int32_t kVersion = VQ_RTX_VERSION;  // what the RTX libraries accept; the bindings pass their own

void* Symbol(const char* library, const char* name) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    void* symbol = handle == nullptr ? nullptr : dlsym(handle, name);
    if (symbol == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        std::abort();
    }
    return symbol;
}

template <typename Function>
Function* Rtx(const char* name) {
    return reinterpret_cast<Function*>(Symbol(VQ_RTX_LIBRARY, name));
}

template <typename Function>
Function* Parser(const char* name) {
    return reinterpret_cast<Function*>(Symbol(VQ_RTX_PARSER, name));
}

}  // namespace

extern "C" {
void* createInferBuilder_INTERNAL(void* logger, std::int32_t) {
    return Rtx<void*(void*, std::int32_t)>("createInferBuilder_INTERNAL")(logger, kVersion);
}
void* createInferRuntime_INTERNAL(void* logger, std::int32_t) {
    return Rtx<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL")(logger, kVersion);
}
void* createInferRefitter_INTERNAL(void* engine, void* logger, std::int32_t) {
    return Rtx<void*(void*, void*, std::int32_t)>("createInferRefitter_INTERNAL")(engine, logger, kVersion);
}
void* getPluginRegistry() { return Rtx<void*()>("getPluginRegistry")(); }
void* getBuilderPluginRegistry(std::int32_t capability) {
    return Rtx<void*(std::int32_t)>("getBuilderPluginRegistry")(capability);
}
void* createNvOnnxParser_INTERNAL(void* network, void* logger, std::int32_t) {
    return Parser<void*(void*, void*, std::int32_t)>("createNvOnnxParser_INTERNAL")(network, logger, kVersion);
}
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, std::int32_t) {
    return Parser<void*(void*, void*, std::int32_t)>("createNvOnnxParserRefitter_INTERNAL")(refitter, logger, kVersion);
}
std::int32_t getNvOnnxParserVersion() { return Parser<std::int32_t()>("getNvOnnxParserVersion")(); }
bool initLibNvInferPlugins(void*, const char*) { return true; }
}
