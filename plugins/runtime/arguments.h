// What both programs take on the command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vq {

struct Arguments {
    std::string model;    // model.onnx or a plan
    std::string library;  // libvq_ort.so or libvq_trt.so; empty: none
    std::string runtime;  // the runtime's own library, as dlopen takes it
    int64_t max_new_tokens = 32;
    std::vector<int64_t> end_ids;  // tokens that end the text; they are not printed
    std::vector<int64_t> prompt;   // token ids, at least one
};

// Throws std::invalid_argument with one sentence where the command line cannot be used. `runtime`: what is opened where
// --runtime does not say otherwise.
Arguments ParseArguments(int argc, char** argv, const std::string& runtime);

}  // namespace vq
