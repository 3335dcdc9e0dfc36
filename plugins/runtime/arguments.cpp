#include "arguments.h"

#include <stdexcept>

namespace vq {
namespace {

int64_t Number(const std::string& text) {
    size_t used = 0;
    int64_t value = -1;
    try {
        value = std::stoll(text, &used);
    } catch (const std::exception&) {
        used = 0;
    }
    if (used == 0 || used != text.size() || value < 0) {
        throw std::invalid_argument("'" + text + "' was given where a number from 0 was expected");
    }
    return value;
}

}  // namespace

Arguments ParseArguments(int argc, char** argv, const std::string& runtime) {
    Arguments found;
    found.runtime = runtime;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const bool is_option = word.rfind("--", 0) == 0;
        if (is_option && i + 1 == argc) throw std::invalid_argument(word + " has no value");
        if (word == "--library") {
            found.library = argv[++i];
        } else if (word == "--runtime") {
            found.runtime = argv[++i];
        } else if (word == "--max-new-tokens") {
            found.max_new_tokens = Number(argv[++i]);
        } else if (word == "--end") {
            found.end_ids.push_back(Number(argv[++i]));
        } else if (is_option) {
            throw std::invalid_argument(word + " is no option");
        } else if (found.model.empty()) {
            found.model = word;
        } else {
            found.prompt.push_back(Number(word));
        }
    }
    if (found.prompt.empty()) {
        throw std::invalid_argument(
            "usage: MODEL TOKEN_ID... [--library FILE] [--runtime FILE] [--max-new-tokens N] [--end TOKEN_ID]...");
    }
    return found;
}

}  // namespace vq
