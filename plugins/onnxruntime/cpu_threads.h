// The session's threads, as the CPU kernels take them.
#pragma once

#include <thread>

#include "constants.h"
#include "cpu/dispatch.h"

namespace vq::ort {

// Runs on the session's threads; `context` must outlive what is returned.
inline cpu::ParallelFor SessionThreads(Ort::KernelContext& context) {
    return [&context](int64_t count, const std::function<void(int64_t)>& body) {
        using Body = const std::function<void(int64_t)>;
        context.ParallelFor([](void* data, size_t i) { (*static_cast<Body*>(data))(static_cast<int64_t>(i)); },
                            static_cast<size_t>(count), 0, const_cast<void*>(static_cast<const void*>(&body)));
    };
}

// Asked once: the answer takes longer than a small head does.
inline int64_t Cores() {
    static const int64_t cores = std::thread::hardware_concurrency();
    return cores;
}

}  // namespace vq::ort
