// What every C call that can fail does with its error.
#pragma once

#include <exception>
#include <string>

namespace vq {

// The error of `work`, which returns one or throws; null for none. Valid until the thread's next call of the same work.
template <typename Work>
const char* Guarded(const Work& work) {
    thread_local std::string error;
    try {
        error = work();
    } catch (const std::exception& failure) {
        error = failure.what();
    }
    return error.empty() ? nullptr : error.c_str();
}

}  // namespace vq
