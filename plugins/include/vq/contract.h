// The op contract, mirrored from exporter/contract.py; tests/plugins/test_contract.py holds the two together.
//
// Dimension letters: B batch, S sequence, D hidden_size, V vocab_size, M num_codebooks, K num_codes per codebook.
#pragma once

namespace vq::contract {

inline constexpr char kDomain[] = "com.vqlogits";  // ONNX domain and TensorRT plugin namespace
inline constexpr int kVersion = 1;                 // opset version of the domain
inline constexpr char kPluginVersion[] = "1";      // the same, as TensorRT writes it

inline constexpr char kGatherScatter[] = "VQGatherScatter";

inline constexpr char kNumCodebooks[] = "num_codebooks";
inline constexpr char kCodeBits[] = "code_bits";    // plugin form only: 8 or 16
inline constexpr char kVocabSize[] = "vocab_size";  // plugin form only

// Inputs of VQGatherScatter, in order; bias is optional.
enum GatherScatterInput : int { kCodeLogits = 0, kCodes = 1, kBias = 2 };
inline constexpr const char* kGatherScatterInputs[] = {"code_logits", "codes", "bias"};
inline constexpr const char* kGatherScatterOutputs[] = {"logits"};

}  // namespace vq::contract
