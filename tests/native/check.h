// The smallest of test frameworks: CHECK says what failed and where, and main returns the number of failures.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

namespace check {

inline int failures = 0;

inline void Report(bool held, const char* what, const char* file, int line, const std::string& detail) {
    if (held) return;
    ++failures;
    if (failures <= 20) std::fprintf(stderr, "%s:%d: %s  %s\n", file, line, what, detail.c_str());
}

// The last line of main: says how many failed.
inline int Done(const char* name) {
    std::printf("%s: %s (%d failures)\n", name, failures == 0 ? "passed" : "FAILED", failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace check

// CHECK(condition) or CHECK(condition, << "row " << r): the detail is only made when it is needed.
#define CHECK(condition, ...)                                                      \
    do {                                                                           \
        if (!(condition)) {                                                        \
            std::ostringstream detail_;                                            \
            detail_ << "" __VA_ARGS__;                                             \
            ::check::Report(false, #condition, __FILE__, __LINE__, detail_.str()); \
        }                                                                          \
    } while (false)
