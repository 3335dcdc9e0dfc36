// The op contract, mirrored from exporter/contract.py; tests/plugins/test_contract.py holds the two together.
//
// Dimension letters: B batch, S sequence, D hidden_size, V vocab_size, M num_codebooks, K num_codes per codebook.
#pragma once

namespace vq::contract {

inline constexpr char kDomain[] = "com.vqlogits";  // ONNX domain and TensorRT plugin namespace
inline constexpr int kVersion = 1;                 // opset version of the domain
inline constexpr char kPluginVersion[] = "1";      // the same, as TensorRT writes it

inline constexpr char kGatherScatter[] = "VQGatherScatter";
inline constexpr char kTopK[] = "VQTopK";
inline constexpr char kSample[] = "VQSample";

inline constexpr char kNumCodebooks[] = "num_codebooks";
inline constexpr char kNumBest[] = "k";  // VQTopK only: 1 to kMaxBest, at most V
inline constexpr int kMaxBest = 256;
inline constexpr char kCodeBits[] = "code_bits";    // plugin form only: 8 or 16
inline constexpr char kVocabSize[] = "vocab_size";  // plugin form only

// Inputs in order; bias is optional. VQGatherScatter and VQTopK take the first three.
enum Input : int { kCodeLogits = 0, kCodes = 1, kBias = 2, kTemperature = 3, kUniform = 4 };
inline constexpr const char* kGatherScatterInputs[] = {"code_logits", "codes", "bias"};
inline constexpr const char* kGatherScatterOutputs[] = {"logits"};
inline constexpr const char* kTopKInputs[] = {"code_logits", "codes", "bias"};
inline constexpr const char* kTopKOutputs[] = {"values", "ids", "logsumexp"};
inline constexpr const char* kSampleInputs[] = {"code_logits", "codes", "bias", "temperature", "uniform"};
inline constexpr const char* kSampleOutputs[] = {"ids", "logprob"};

}  // namespace vq::contract
