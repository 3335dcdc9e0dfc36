// Messages of the plugin library, and the fence that no exception crosses.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

#include "vq/contract.h"

namespace vq::trt {

// What TensorRT takes for success and failure where a method returns int32_t.
inline constexpr int32_t kSuccess = 0;
inline constexpr int32_t kFailure = 1;

// Where messages go from now on; null: to stderr.
void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// One error, to the logger of the engine or parser whose thread this is, else to stderr.
//
// Args: where, the method; what, one sentence; op, whose plugin or creator this is.
void LogError(const char* where, const char* what, const char* op = contract::kGatherScatter) noexcept;

// Logs a refusal. Returns kSuccess for an empty text, else kFailure.
inline int32_t Report(const char* where, const std::string& refusal,
                      const char* op = contract::kGatherScatter) noexcept {
    if (refusal.empty()) return kSuccess;
    LogError(where, refusal.c_str(), op);
    return kFailure;
}

// Runs `call`; an exception is logged, and `failure` returned in its place.
template <typename Result, typename Call>
Result Guard(const char* where, Result failure, const Call& call, const char* op = contract::kGatherScatter) noexcept {
    try {
        return call();
    } catch (const std::exception& error) {
        LogError(where, error.what(), op);
    } catch (...) {
        LogError(where, "an unknown exception", op);
    }
    return failure;
}

}  // namespace vq::trt
