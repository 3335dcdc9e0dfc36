// Greedy decoding over any decoder: one prefill, then a token at a time through the KV cache.
#pragma once

#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>

#include "arguments.h"

namespace vq {

// The main of both programs: prints the new token ids, one a line, as they come. Decoder(arguments) opens the model,
// Next(tokens) goes on by those tokens and returns the most likely next one. Returns the exit code: 0, or 2 with a
// sentence.
template <typename Decoder>
int Run(int argc, char** argv, const char* runtime) {
    try {
        const Arguments arguments = ParseArguments(argc, argv, runtime);
        Decoder decoder(arguments);
        std::vector<int64_t> tokens = arguments.prompt;
        for (int64_t made = 0; made < arguments.max_new_tokens; ++made) {
            const int64_t token = decoder.Next(tokens);
            if (std::count(arguments.end_ids.begin(), arguments.end_ids.end(), token) > 0) break;
            std::printf("%lld\n", static_cast<long long>(token));
            std::fflush(stdout);
            tokens = {token};
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}

}  // namespace vq
