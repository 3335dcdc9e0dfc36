// The plugin's fields: what createPlugin refuses, and that a plan gives back what went into it.
#include <algorithm>
#include <limits>
#include <random>

#include "tensorrt_host.h"

namespace {

using host::Create;
using host::FieldOf;
using host::Fields;
using host::Library;
using host::Plugin;
using host::PluginField;
using host::PluginFieldType;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::PluginFieldCollection;
using nvinfer1::TensorRTPhase;

// Fields as a table: name, type, number, length. What is refused is refused in both phases, with a sentence.
struct Mistake {
    const char* message;
    const char* name;
    PluginFieldType type;
    int64_t number;
    int32_t length;
};

void TestRefusedFields(Library& library, IPluginCreatorV3One* creator) {
    constexpr auto kInt32 = PluginFieldType::kINT32, kInt64 = PluginFieldType::kINT64;
    const Mistake mistakes[] = {
        {"field num_codebooks is missing", "num_codebook", kInt32, 2, 1},
        {"field num_codebooks is 0, expected 1 to 2147483647", "num_codebooks", kInt32, 0, 1},
        {"field num_codebooks is -1, expected 1 to", "num_codebooks", kInt64, -1, 1},
        {"field num_codebooks has the field type 1, expected INT32 or INT64", "num_codebooks",
         PluginFieldType::kFLOAT32, 2, 1},
        {"field num_codebooks has the field type 8", "num_codebooks", PluginFieldType::kUNKNOWN, 2, 1},
        {"field num_codebooks has 2 values, expected 1", "num_codebooks", kInt32, 2, 2},
        {"field num_codebooks has 0 values, expected 1", "num_codebooks", kInt32, 2, 0},
        {"field code_bits is missing", "codebits", kInt32, 8, 1},
        {"field code_bits is 32, expected 8 or 16", "code_bits", kInt32, 32, 1},
        {"field code_bits is 9, expected 8 or 16", "code_bits", kInt64, 9, 1},
        {"field code_bits has 4 values", "code_bits", kInt32, 8, 4},
        {"field vocab_size is missing", "vocab", kInt32, 7, 1},
        {"field vocab_size is 0, expected 1 to 2147483647", "vocab_size", kInt32, 0, 1},
        {"field vocab_size is 2147483648, expected 1 to 2147483647", "vocab_size", kInt64, int64_t{1} << 31, 1},
        {"field vocab_size is -7", "vocab_size", kInt32, -7, 1},
    };
    for (const Mistake& mistake : mistakes) {
        for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
            Fields fields;
            const auto add = [&](const char* name, int32_t good) {
                // A mistake of a name takes the place of the field that it is a misspelling of.
                if (std::strncmp(mistake.name, name, 4) != 0) return fields.Add(name, kInt32, good);
                if (mistake.type == kInt64) return fields.Add(mistake.name, kInt64, mistake.number, mistake.length);
                fields.Add(mistake.name, mistake.type, static_cast<int32_t>(mistake.number), mistake.length);
            };
            add("num_codebooks", 2);
            add("code_bits", 8);
            add("vocab_size", 7);
            CHECK(Plugin(Create(creator, fields, phase)).object == nullptr, << mistake.message);
            CHECK_LOGGED(library, mistake.message);
        }
    }
    Fields twice(2, 8, 7);
    twice.Add("code_bits", kInt32, 8);
    CHECK(Plugin(Create(creator, twice)).object == nullptr);
    CHECK_LOGGED(library, "node node: field code_bits is given twice");
    Fields product(1 << 20, 8, 1 << 30);  // each fits, V*M does not
    CHECK(Plugin(Create(creator, product)).object == nullptr);
    CHECK_LOGGED(library, "vocab_size is 1073741824");
    CHECK(creator->createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK_LOGGED(library, "no fields were given");
    const PluginField no_data[] = {{"num_codebooks", nullptr, PluginFieldType::kINT32, 1}};
    const PluginFieldCollection no_data_collection{1, no_data};
    CHECK(creator->createPlugin(nullptr, &no_data_collection, TensorRTPhase::kBUILD) == nullptr);
    CHECK_LOGGED(library, "field num_codebooks has no data");
    const PluginFieldCollection no_fields{2, nullptr};
    CHECK(creator->createPlugin("node", &no_fields, TensorRTPhase::kBUILD) == nullptr);
    CHECK_LOGGED(library, "no fields were given");
}

// The plugin's own fields -> bytes of a plan -> fields of another process: what TensorRT does between the two phases.
void CopyFields(const PluginFieldCollection& from, Fields* to) {
    for (int32_t i = 0; i < from.nbFields; ++i) {
        int32_t number = 0;
        CHECK(from.fields[i].type == PluginFieldType::kINT32 && from.fields[i].length == 1, << from.fields[i].name);
        std::memcpy(&number, from.fields[i].data, sizeof(number));
        to->Add(from.fields[i].name, from.fields[i].type, number);
    }
}

void TestSerialisation(Library& library, IPluginCreatorV3One* creator) {
    std::mt19937 random(7);
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    for (int i = 0; i < 2000; ++i) {
        // Log-uniform, so that small numbers, powers of two and the largest all come up.
        const auto draw = [&](int64_t most) {
            const auto bits = std::uniform_int_distribution<int>(0, 31)(random);
            return std::min<int64_t>(most, std::uniform_int_distribution<int64_t>(1, int64_t{1} << bits)(random));
        };
        const int64_t vocab_size = i == 0 ? kMax : draw(kMax);
        const int64_t num_codebooks = draw(std::min(kMax, (int64_t{1} << 40) / vocab_size));
        const int32_t code_bits = random() % 2 == 0 ? 8 : 16;
        Fields attributes;
        attributes.Add("vocab_size", PluginFieldType::kINT64, vocab_size);  // any order, either integer type
        attributes.Add("code_bits", PluginFieldType::kINT32, code_bits);
        attributes.Add("something else", PluginFieldType::kFLOAT32, 1.0F);
        attributes.Add("num_codebooks", PluginFieldType::kINT64, num_codebooks);
        auto built = std::make_unique<Plugin>(Create(creator, attributes));
        if (built->object == nullptr) {
            CHECK(false, << "V=" << vocab_size << " M=" << num_codebooks);
            continue;
        }
        Fields plan;
        CopyFields(*built->runtime->getFieldsToSerialize(), &plan);
        const std::string id = built->build->getTimingCacheID();
        built.reset();
        Plugin loaded(Create(creator, plan, TensorRTPhase::kRUNTIME));
        CHECK(loaded.core != nullptr && loaded.runtime != nullptr);
        CHECK(FieldOf(loaded, "num_codebooks") == num_codebooks, << num_codebooks);
        CHECK(FieldOf(loaded, "code_bits") == code_bits, << code_bits);
        CHECK(FieldOf(loaded, "vocab_size") == vocab_size, << vocab_size);
        CHECK(loaded.runtime->getFieldsToSerialize()->nbFields == 3);
        CHECK(id == loaded.build->getTimingCacheID(), << id);
    }
    CHECK_QUIET(library);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: %s libvq_trt.so\n", argv[0]), 2;
    Library library(argv[1]);
    IPluginCreatorV3One* creator = library.Creator();
    TestRefusedFields(library, creator);
    TestSerialisation(library, creator);
    return check::Done("tensorrt fields");
}
