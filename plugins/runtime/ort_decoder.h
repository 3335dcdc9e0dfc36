// A decoder graph in ONNX Runtime, on the CPU: one sequence, its KV cache kept between calls.
//
// Names and shapes are read from the graph: input_ids, attention_mask, position_ids int64 [1, S] where it has them,
// past_key_values.* [1, heads, P, head_dim] -> present.*; the answer is in `ids` int64 [1, S, k] or `logits` [1, S, V].
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"

namespace vq {

class OrtDecoder {
public:
    // Opens arguments.model with arguments.library, where one is given, as custom ops. Throws std::exception.
    explicit OrtDecoder(const Arguments& arguments);

    // Feeds tokens after all that came before; returns the most likely next one, of equal ones the lower id.
    int64_t Next(std::vector<int64_t> tokens);

private:
    // Opens ONNX Runtime itself; the first member, as nothing of its API works before.
    struct Runtime {
        explicit Runtime(const std::string& library);
    };
    struct Input {
        std::string name;
        ONNXTensorElementDataType type;
        std::vector<int64_t> shape;  // [1, heads, 0, head_dim] of a cache, empty for the others
        Ort::Value cache{nullptr};   // of past_key_values.*: what the last call returned
    };

    void ReadInputs();
    void ReadOutputs();

    Runtime runtime_;
    Ort::Env env_;
    Ort::Session session_;
    std::vector<Input> inputs_;
    std::vector<std::string> outputs_;
    std::vector<size_t> caches_;  // for each output, the index of the input that takes it, or kNone
    size_t answer_ = 0;           // the output that tells the next token
    int64_t total_ = 0;           // tokens so far
};

}  // namespace vq
