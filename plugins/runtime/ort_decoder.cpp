#include "ort_decoder.h"

#include <dlfcn.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace vq {
namespace {

constexpr uint32_t kApiVersion = 22;  // ONNX Runtime 1.22, as libvq_ort.so needs; later ones have it too
constexpr size_t kNone = static_cast<size_t>(-1);
constexpr char kPast[] = "past_key_values.";
constexpr char kPresent[] = "present.";

bool StartsWith(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

Ort::Session Open(const Ort::Env& env, const Arguments& arguments) {
    Ort::SessionOptions options;
    if (!arguments.library.empty()) options.RegisterCustomOpsLibrary(arguments.library.c_str());
    return Ort::Session(env, arguments.model.c_str(), options);
}

// The first of the largest of `width` logits.
template <typename T>
int64_t Largest(const T* logits, int64_t width) {
    const auto less = [](const T& a, const T& b) { return static_cast<float>(a) < static_cast<float>(b); };
    return std::max_element(logits, logits + width, less) - logits;
}

// The best token at the last position of `ids` [1, S, k] or `logits` [1, S, V].
int64_t LastBest(const Ort::Value& answer) {
    const auto info = answer.GetTensorTypeAndShapeInfo();
    const std::vector<int64_t> shape = info.GetShape();
    const int64_t offset = (shape[1] - 1) * shape[2];
    switch (info.GetElementType()) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
            return answer.GetTensorData<int64_t>()[offset];
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return Largest(answer.GetTensorData<float>() + offset, shape[2]);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return Largest(answer.GetTensorData<Ort::Float16_t>() + offset, shape[2]);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
            return Largest(answer.GetTensorData<Ort::BFloat16_t>() + offset, shape[2]);
        default:
            throw std::runtime_error("the graph's logits are of another type than float32, float16 and bfloat16");
    }
}

Ort::Value Row(std::vector<int64_t>& numbers) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const int64_t shape[] = {1, static_cast<int64_t>(numbers.size())};
    return Ort::Value::CreateTensor<int64_t>(memory, numbers.data(), numbers.size(), shape, 2);
}

}  // namespace

OrtDecoder::Runtime::Runtime(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) throw std::runtime_error(std::string(dlerror()) + "; name ONNX Runtime with --runtime FILE");
    const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
    if (base == nullptr) throw std::runtime_error(library + ": not ONNX Runtime, it has no OrtGetApiBase");
    const OrtApi* api = base()->GetApi(kApiVersion);
    if (api == nullptr) {
        throw std::runtime_error(std::string("ONNX Runtime 1.22 or newer is needed, this is ") +
                                 base()->GetVersionString());
    }
    Ort::InitApi(api);
}

OrtDecoder::OrtDecoder(const Arguments& arguments)
    : runtime_(arguments.runtime), env_(ORT_LOGGING_LEVEL_ERROR, "vq"), session_(Open(env_, arguments)) {
    ReadInputs();
    ReadOutputs();
}

void OrtDecoder::ReadInputs() {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
        const auto type = session_.GetInputTypeInfo(i);
        const auto info = type.GetTensorTypeAndShapeInfo();
        Input input{session_.GetInputNameAllocated(i, allocator).get(), info.GetElementType(), {}};
        if (StartsWith(input.name, kPast)) {
            input.shape = info.GetShape();
            input.shape[0] = 1;
            input.shape[2] = 0;
            input.cache = Ort::Value::CreateTensor(allocator, input.shape.data(), input.shape.size(), input.type);
        } else if (input.name != "input_ids" && input.name != "attention_mask" && input.name != "position_ids") {
            throw std::runtime_error("the graph has an input " + input.name +
                                     ", which is none of a greedy decoder's; export with --output topk or logits");
        }
        inputs_.push_back(std::move(input));
    }
}

void OrtDecoder::ReadOutputs() {
    Ort::AllocatorWithDefaultOptions allocator;
    bool answers = false;
    for (size_t i = 0; i < session_.GetOutputCount(); ++i) {
        const std::string name = session_.GetOutputNameAllocated(i, allocator).get();
        outputs_.push_back(name);
        caches_.push_back(kNone);
        if (name == "ids" || name == "logits") {
            answer_ = i;
            answers = true;
        }
        if (!StartsWith(name, kPresent)) continue;
        const std::string past = kPast + name.substr(sizeof(kPresent) - 1);
        const auto taker =
            std::find_if(inputs_.begin(), inputs_.end(), [&](const Input& in) { return in.name == past; });
        if (taker == inputs_.end()) throw std::runtime_error("the graph gives " + name + " but takes no " + past);
        caches_[i] = static_cast<size_t>(taker - inputs_.begin());
    }
    if (!answers) throw std::runtime_error("the graph has no output ids or logits; give a model.onnx of export-vq");
}

int64_t OrtDecoder::Next(std::vector<int64_t> tokens) {
    const int64_t before = total_;
    total_ += static_cast<int64_t>(tokens.size());
    std::vector<int64_t> mask(static_cast<size_t>(total_), 1), positions(tokens.size());
    std::iota(positions.begin(), positions.end(), before);

    std::vector<const char*> input_names, output_names;
    std::vector<Ort::Value> inputs;
    for (Input& input : inputs_) {
        input_names.push_back(input.name.c_str());
        if (input.name == "input_ids") {
            inputs.push_back(Row(tokens));
        } else if (input.name == "attention_mask") {
            inputs.push_back(Row(mask));
        } else if (input.name == "position_ids") {
            inputs.push_back(Row(positions));
        } else {
            inputs.push_back(std::move(input.cache));
        }
    }
    for (const std::string& name : outputs_) output_names.push_back(name.c_str());
    auto outputs = session_.Run(Ort::RunOptions{nullptr}, input_names.data(), inputs.data(), inputs.size(),
                                output_names.data(), output_names.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
        if (caches_[i] != kNone) inputs_[caches_[i]].cache = std::move(outputs[i]);
    }
    return LastBest(outputs[answer_]);
}

}  // namespace vq
