#include "fields.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "vq/contract.h"
#include "vq/shape.h"

namespace vq::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

template <typename Integer>
int64_t Load(const void* data) {
    Integer value;  // field data has no promised alignment
    std::memcpy(&value, data, sizeof(value));
    return value;
}

// Reads the one field of this name into `value`, which must lie in 1 to 2^31 - 1.
std::string ReadInteger(const PluginFieldCollection& collection, const char* name, int32_t* value) {
    const PluginField* found = nullptr;
    for (int32_t i = 0; i < collection.nbFields; ++i) {
        const PluginField& field = collection.fields[i];
        if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
        if (found != nullptr) return std::string("field ") + name + " is given twice, expected once";
        found = &field;
    }
    if (found == nullptr) return std::string("field ") + name + " is missing, expected one integer";
    const bool wide = found->type == PluginFieldType::kINT64;
    if (!wide && found->type != PluginFieldType::kINT32) {
        return std::string("field ") + name + " has the field type " +
               std::to_string(static_cast<int32_t>(found->type)) + ", expected INT32 or INT64";
    }
    if (found->length != 1) {
        return std::string("field ") + name + " has " + std::to_string(found->length) + " values, expected 1";
    }
    if (found->data == nullptr) return std::string("field ") + name + " has no data, expected one integer";
    const int64_t number = wide ? Load<int64_t>(found->data) : Load<int32_t>(found->data);
    if (number < 1 || number > kMaxInt32) {
        return std::string("field ") + name + " is " + std::to_string(number) + ", expected 1 to " +
               std::to_string(kMaxInt32);
    }
    *value = static_cast<int32_t>(number);
    return {};
}

}  // namespace

const PluginFieldCollection* GatherScatterFieldNames() {
    // INT32 although ONNX attributes are 64 bits wide: every parser from 10.0 on narrows them to what is declared.
    static const PluginField fields[] = {
        {contract::kNumCodebooks, nullptr, PluginFieldType::kINT32, 1},
        {contract::kCodeBits, nullptr, PluginFieldType::kINT32, 1},
        {contract::kVocabSize, nullptr, PluginFieldType::kINT32, 1},
    };
    static const PluginFieldCollection collection{static_cast<int32_t>(std::size(fields)), fields};
    return &collection;
}

std::string ReadFields(const PluginFieldCollection* collection, GatherScatterFields* fields) {
    if (collection == nullptr || (collection->fields == nullptr && collection->nbFields > 0)) {
        return "no fields were given, expected num_codebooks, code_bits and vocab_size";
    }
    std::string refusal = ReadInteger(*collection, contract::kNumCodebooks, &fields->num_codebooks);
    if (refusal.empty()) refusal = ReadInteger(*collection, contract::kCodeBits, &fields->code_bits);
    if (refusal.empty()) refusal = ReadInteger(*collection, contract::kVocabSize, &fields->vocab_size);
    if (!refusal.empty()) return refusal;
    if (fields->code_bits != 8 && fields->code_bits != 16) {
        return std::string("field ") + contract::kCodeBits + " is " + std::to_string(fields->code_bits) +
               ", expected 8 or 16";
    }
    // The number of rows and of codes are not known here; 0 and 1 pass for any.
    return CheckShape({0, fields->num_codebooks, 1, fields->vocab_size});
}

const PluginFieldCollection* TopKFieldNames() {
    static const PluginField fields[] = {
        {contract::kNumCodebooks, nullptr, PluginFieldType::kINT32, 1},
        {contract::kCodeBits, nullptr, PluginFieldType::kINT32, 1},
        {contract::kVocabSize, nullptr, PluginFieldType::kINT32, 1},
        {contract::kNumBest, nullptr, PluginFieldType::kINT32, 1},
    };
    static const PluginFieldCollection collection{static_cast<int32_t>(std::size(fields)), fields};
    return &collection;
}

std::string ReadTopKFields(const PluginFieldCollection* collection, TopKFields* fields) {
    std::string refusal = ReadFields(collection, fields);
    if (refusal.empty()) refusal = ReadInteger(*collection, contract::kNumBest, &fields->num_best);
    if (!refusal.empty()) return refusal;
    const int32_t most = std::min<int32_t>(contract::kMaxBest, fields->vocab_size);
    if (fields->num_best <= most) return {};
    return std::string("field ") + contract::kNumBest + " is " + std::to_string(fields->num_best) + ", expected 1 to " +
           std::to_string(most);
}

}  // namespace vq::trt
