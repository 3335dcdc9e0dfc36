#include "logging.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <typeinfo>

namespace vq::trt {
namespace {

using nvinfer1::ILogger;

// Where ILoggerFinder::findLogger and ILogger::log stand in their tables of virtual functions. TensorRT 11 put
// IVersionedInterface with its four entries in front of both, so a library that called them through the headers it was
// compiled with would crash in the other version, as when a plan of 10 that carries the library is run by 11. The
// interfaces of plugins themselves are laid out alike in both.
constexpr int kNoSlot = -1, kSlot10 = 0, kSlot11 = 4;

// The name of the interface among a type and its bases tells: 11 moved it into a namespace of its own.
int SlotOf(const std::type_info& type) {
    if (std::strcmp(type.name(), "N8nvinfer113ILoggerFinderE") == 0) return kSlot10;
    if (std::strcmp(type.name(), "N8nvinfer15v_1_013ILoggerFinderE") == 0) return kSlot11;
    if (const auto* one = dynamic_cast<const abi::__si_class_type_info*>(&type)) return SlotOf(*one->__base_type);
    if (const auto* several = dynamic_cast<const abi::__vmi_class_type_info*>(&type)) {
        for (unsigned i = 0; i < several->__base_count; ++i) {
            const int slot = SlotOf(*several->__base_info[i].__base_type);
            if (slot != kNoSlot) return slot;
        }
    }
    return kNoSlot;
}

// As the C++ ABI lays an object out: its first word points at its virtual functions, in front of which stands its type,
// null where the library was compiled without run-time types. A method is called with the object as first argument.
const void* const* TableOf(const void* object) { return *static_cast<const void* const* const*>(object); }

void* CallFindLogger(void* finder, int slot) {
    return reinterpret_cast<void* (*)(void*)>(const_cast<void*>(TableOf(finder)[slot]))(finder);
}

void CallLog(void* logger, int slot, const char* message) {
    using Log = void (*)(void*, ILogger::Severity, const char*);
    reinterpret_cast<Log>(const_cast<void*>(TableOf(logger)[slot]))(logger, ILogger::Severity::kERROR, message);
}

// Set by whoever loads the library, read by every thread.
std::atomic<void*> logger_finder{nullptr};

bool LogToTensorRt(const char* message) noexcept {
    void* finder = logger_finder.load(std::memory_order_acquire);
    if (finder == nullptr) return false;
    try {  // findLogger is not noexcept
        const auto* type = static_cast<const std::type_info*>(TableOf(finder)[-1]);
        const int slot = type == nullptr ? kNoSlot : SlotOf(*type);
        void* logger = slot == kNoSlot ? nullptr : CallFindLogger(finder, slot);
        if (logger == nullptr) return false;
        CallLog(logger, slot, message);
        return true;
    } catch (...) {
        return false;
    }
}

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    logger_finder.store(finder, std::memory_order_release);
}

void LogError(const char* where, const char* what, const char* op) noexcept {
    // Fixed size: this is also how running out of memory is reported. A longer message is cut.
    char message[1024];
    std::snprintf(message, sizeof(message), "%s %s: %s", op, where, what);
    if (!LogToTensorRt(message)) std::fprintf(stderr, "%s\n", message);
}

}  // namespace vq::trt
