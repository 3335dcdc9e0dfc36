// What the plugin says about tensors: types, formats, output shapes, and which sizes it refuses, by name, before a
// kernel could read past an end.
#include "tensorrt_host.h"

namespace {

using host::Create;
using host::DataType;
using host::Dims;
using host::Expressions;
using host::Fields;
using host::Library;
using host::Plugin;
using host::PluginTensorDesc;
using host::Shape;
using host::Tensor;
using host::TensorFormat;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCreatorV3One;

constexpr int32_t kTypes = nvinfer1::EnumMax<DataType>(), kFormats = nvinfer1::EnumMax<TensorFormat>();

bool IsT(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

// The expected table: code_logits, codes, [bias,] logits.
bool Expected(int32_t pos, DataType type, TensorFormat format, DataType first) {
    if (format != TensorFormat::kLINEAR) return false;
    if (pos == 0) return IsT(type);
    return pos == 1 ? type == DataType::kINT32 : type == first;
}

void TestFormats(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(2, 8, 7);
    Plugin plugin(Create(creator, fields));
    for (const int32_t num_inputs : {2, 3}) {
        int accepted = 0;
        for (const DataType first : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
            for (int32_t pos = 0; pos <= num_inputs; ++pos) {
                for (int32_t type = 0; type < kTypes; ++type) {
                    for (int32_t format = 0; format < kFormats; ++format) {
                        // What comes after pos is invalid, and must not be looked at: any content, the same answer.
                        for (const DataType later : {first, DataType::kINT32, DataType::kBOOL}) {
                            std::vector<DynamicPluginTensorDesc> all(num_inputs + 1);
                            for (int32_t i = 0; i <= num_inputs; ++i) {
                                const DataType before = i == 1 ? DataType::kINT32 : first;
                                all[i].desc = Tensor(i < pos ? before : later, {});
                            }
                            all[pos].desc.type = static_cast<DataType>(type);
                            all[pos].desc.format = static_cast<TensorFormat>(format);
                            const bool found = plugin.build->supportsFormatCombination(pos, all.data(), num_inputs, 1);
                            const bool expected = Expected(pos, all[pos].desc.type, all[pos].desc.format, first);
                            CHECK(found == expected, << num_inputs << " inputs, pos " << pos << " type " << type
                                                     << " format " << format << " first " << static_cast<int>(first));
                            accepted += found;
                        }
                    }
                }
            }
        }
        // Of each first type: one answer per position but pos 0, which takes all three whatever `first` is.
        CHECK(accepted == 3 * 3 * (3 + num_inputs), << accepted);
    }
    std::vector<DynamicPluginTensorDesc> all(5);
    for (DynamicPluginTensorDesc& tensor : all) tensor.desc = Tensor(DataType::kFLOAT, {});
    all[1].desc.type = DataType::kINT32;
    CHECK(!plugin.build->supportsFormatCombination(0, all.data(), 1, 1));
    CHECK(!plugin.build->supportsFormatCombination(0, all.data(), 4, 1));
    CHECK(!plugin.build->supportsFormatCombination(0, all.data(), 2, 2));
    CHECK(!plugin.build->supportsFormatCombination(3, all.data(), 2, 1));
    CHECK(!plugin.build->supportsFormatCombination(-1, all.data(), 2, 1));
    CHECK_QUIET(library);  // asking is no error
}

void TestOutputTypes(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(2, 8, 7);
    Plugin plugin(Create(creator, fields));
    for (int32_t code = 0; code < kTypes * kTypes * kTypes; ++code) {
        const DataType in[] = {static_cast<DataType>(code % kTypes), static_cast<DataType>(code / kTypes % kTypes),
                               static_cast<DataType>(code / kTypes / kTypes)};
        for (const int32_t num_inputs : {2, 3}) {
            const bool expected = IsT(in[0]) && in[1] == DataType::kINT32 && (num_inputs == 2 || in[2] == in[0]);
            DataType out = DataType::kBOOL;
            const bool found = plugin.build->getOutputDataTypes(&out, 1, in, num_inputs) == 0;
            CHECK(found == expected && out == (expected ? in[0] : DataType::kBOOL), << code << " " << num_inputs);
            if (expected) {
                CHECK_QUIET(library);
            } else {
                const char* name = !IsT(in[0]) ? "code_logits" : in[1] != DataType::kINT32 ? "codes" : "bias";
                CHECK_LOGGED(library, std::string("getOutputDataTypes: ") + name + " has the data type");
            }
        }
    }
    DataType in[4] = {}, out[2] = {};
    CHECK(plugin.build->getOutputDataTypes(out, 1, in, 4) != 0);
    CHECK_LOGGED(library, "there are 4 inputs and 1 outputs");
    CHECK(plugin.build->getOutputDataTypes(out, 2, in, 2) != 0);
    CHECK_LOGGED(library, "there are 2 inputs and 2 outputs");
}

void TestOutputShapes(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(2, 8, 7);
    Plugin plugin(Create(creator, fields));
    const std::vector<std::vector<int64_t>> leads = {{},     {1},      {0},     {-1},
                                                     {3, 5}, {-1, -1}, {-1, 1}, {1, 2, 3, 4, 5, 6, 7}};
    for (const std::vector<int64_t>& lead : leads) {
        for (const int64_t width : {2, 10, 512, -1}) {
            std::vector<int64_t> extents = lead;
            extents.push_back(width);
            Expressions expressions;
            const DimsExprs in[] = {expressions.Shape(extents), expressions.Shape({2, 4}), expressions.Shape({7})};
            for (const int32_t num_inputs : {2, 3}) {
                DimsExprs out{};
                CHECK(plugin.build->getOutputShapes(in, num_inputs, nullptr, 0, &out, 1, expressions) == 0);
                CHECK(out.nbDims == in[0].nbDims, << out.nbDims);
                // The very expressions of the leading dimensions, so that TensorRT sees that they are equal.
                for (int32_t i = 0; i + 1 < out.nbDims; ++i) CHECK(out.d[i] == in[0].d[i], << "dimension " << i);
                const nvinfer1::IDimensionExpr* last = out.d[out.nbDims - 1];
                CHECK(last != nullptr && last->isConstant() && last->getConstantValue() == 7);
            }
        }
    }
    CHECK_QUIET(library);
    // Sizes that are known are checked here already, where a parser can say which node is wrong.
    Expressions expressions;
    DimsExprs out{};
    const DimsExprs odd[] = {expressions.Shape({-1, 9}), expressions.Shape({2, 4})};
    CHECK(plugin.build->getOutputShapes(odd, 2, nullptr, 0, &out, 1, expressions) != 0);
    CHECK_LOGGED(library,
                 "getOutputShapes: code_logits has the shape [-1, 9], expected a last dimension that is a multiple");
    const DimsExprs unpacked[] = {expressions.Shape({-1, 10}), expressions.Shape({7, 2})};
    CHECK(plugin.build->getOutputShapes(unpacked, 2, nullptr, 0, &out, 1, expressions) != 0);
    CHECK_LOGGED(library, "codes has the shape [7, 2], expected [2, 4]");
    CHECK(plugin.build->getOutputShapes(odd, 1, nullptr, 0, &out, 1, expressions) != 0);
    CHECK_LOGGED(library, "there are 1 inputs");
}

// One set of tensors, and what is said about them; an empty message: they are fine.
struct Case {
    const char* message;
    std::vector<PluginTensorDesc> in;
    PluginTensorDesc out;
};

// For num_codebooks 2, code_bits 8, vocab_size 17: packed codes are [2, 8], because 17 bytes fill two 16-byte units.
std::vector<Case> Cases() {
    constexpr DataType kT = DataType::kHALF, kI = DataType::kINT32, kF = DataType::kFLOAT;
    const PluginTensorDesc s = Tensor(kT, {3, 1, 10}), c = Tensor(kI, {2, 8}), b = Tensor(kT, {17});
    const PluginTensorDesc y = Tensor(kT, {3, 1, 17});
    return {
        {"", {s, c}, y},
        {"", {s, c, b}, y},
        {"", {Tensor(kT, {10}), c}, Tensor(kT, {17})},
        {"", {Tensor(kT, {0, 10}), c}, Tensor(kT, {0, 17})},
        {"", {Tensor(kT, {3, 1, 2}), c}, y},
        {"", {Tensor(kT, {3, 1, 600}), c}, y},  // K=300: its ids may all lie below 256
        {"there are 1 inputs and 1 outputs", {s}, y},
        {"there are 4 inputs and 1 outputs", {s, c, b, b}, y},
        {"code_logits has the data type 3, expected FLOAT, HALF or BF16", {Tensor(kI, {3, 1, 10}), c}, y},
        {"codes has the data type 0, expected INT32", {s, Tensor(kF, {2, 8})}, y},
        {"bias has the data type 0, expected that of code_logits", {s, c, Tensor(kF, {17})}, y},
        {"logits has the data type 0, expected that of code_logits", {s, c}, Tensor(kF, {3, 1, 17})},
        {"code_logits has rank 0, expected 1 to 8", {Tensor(kT, {}), c}, y},
        {"code_logits has the shape [3, 1, 9], expected a last dimension that is a multiple of num_codebooks, 2",
         {Tensor(kT, {3, 1, 9}), c},
         y},
        {"code_logits has the shape [3, 1, 0], expected a last dimension", {Tensor(kT, {3, 1, 0}), c}, y},
        {"num_codes is 65537, expected 65536 at most", {Tensor(kT, {3, 1, 2 * 65537}), c}, y},
        {"the number of rows is", {Tensor(kT, {int64_t{1} << 40, int64_t{1} << 40, 10}), c}, y},
        {"codes has the shape [2, 5], expected [2, 8]: one row of words per codebook, for code_bits 8 and vocab_size "
         "17",
         {s, Tensor(kI, {2, 5})},
         y},
        {"codes has the shape [17, 2], expected [2, 8]", {s, Tensor(kI, {17, 2})}, y},
        {"codes has the shape [1, 8], expected [2, 8]", {s, Tensor(kI, {1, 8})}, y},
        {"codes has the shape [16], expected [2, 8]", {s, Tensor(kI, {16})}, y},
        {"bias has the shape [16], expected [17], one value per token", {s, c, Tensor(kT, {16})}, y},
        {"bias has the shape [1, 17], expected [17]", {s, c, Tensor(kT, {1, 17})}, y},
        {"logits has the shape [3, 1, 16], expected [3, 1, 17]", {s, c}, Tensor(kT, {3, 1, 16})},
        {"logits has the shape [1, 3, 17], expected [3, 1, 17]", {s, c}, Tensor(kT, {1, 3, 17})},
        {"logits has the shape [3, 17], expected [3, 1, 17]", {s, c}, Tensor(kT, {3, 17})},
    };
}

void TestSizes(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(2, 8, 17);
    for (const Case& each : Cases()) {
        const auto num_inputs = static_cast<int32_t>(each.in.size());
        const bool expected = *each.message == '\0';
        const auto check = [&](const char* where, int32_t status) {
            CHECK((status == 0) == expected, << where << ": " << each.message);
            if (expected) {
                CHECK_QUIET(library);
            } else {
                CHECK_LOGGED(library, std::string(where) + ": ");
            }
        };
        Plugin plugin(Create(creator, fields));
        check("onShapeChange", plugin.runtime->onShapeChange(each.in.data(), num_inputs, &each.out, 1));
        std::vector<DynamicPluginTensorDesc> in(each.in.size());
        for (size_t i = 0; i < in.size(); ++i) in[i].desc = each.in[i];
        DynamicPluginTensorDesc out{};
        out.desc = each.out;
        check("configurePlugin", plugin.build->configurePlugin(in.data(), num_inputs, &out, 1));
        plugin.runtime->onShapeChange(each.in.data(), num_inputs, &each.out, 1);
        if (!expected) CHECK_LOGGED(library, each.message);
    }
}

// While an engine is built, any extent may be unknown; what is known is still checked.
void TestUnknownSizes(Library& library, IPluginCreatorV3One* creator) {
    Fields fields(2, 8, 17);
    Plugin plugin(Create(creator, fields));
    const auto configure = [&](const std::vector<int64_t>& code_logits, const std::vector<int64_t>& codes,
                               const std::vector<int64_t>& bias, const std::vector<int64_t>& logits) {
        DynamicPluginTensorDesc in[3] = {}, out{};
        in[0].desc = Tensor(DataType::kBF16, code_logits);
        in[1].desc = Tensor(DataType::kINT32, codes);
        in[2].desc = Tensor(DataType::kBF16, bias);
        out.desc = Tensor(DataType::kBF16, logits);
        return plugin.build->configurePlugin(in, 3, &out, 1);
    };
    CHECK(configure({-1, -1, 10}, {2, 8}, {17}, {-1, -1, 17}) == 0);
    CHECK(configure({-1, 5, -1}, {2, -1}, {-1}, {3, 5, -1}) == 0);
    CHECK_QUIET(library);
    CHECK(configure({-1, 5, 10}, {2, 8}, {17}, {3, 4, 17}) != 0);
    CHECK_LOGGED(library, "logits has the shape [3, 4, 17], expected [-1, 5, 17]");
    CHECK(configure({-1, 11}, {2, 8}, {17}, {-1, 17}) != 0);
    CHECK_LOGGED(library, "code_logits has the shape [-1, 11]");
    CHECK(configure({-1, 10}, {3, -1}, {17}, {-1, 17}) != 0);
    CHECK_LOGGED(library, "codes has the shape [3, -1], expected [2, 8]");
}

// The width of a packed row, by hand: 16-byte units of ids, counted in 4-byte words.
void TestPackedWidths(Library& library, IPluginCreatorV3One* creator) {
    const int32_t rows[][3] = {{8, 1, 4},  {8, 16, 4}, {8, 17, 8}, {8, 50257, 12568},
                               {16, 1, 4}, {16, 8, 4}, {16, 9, 8}, {16, 128256, 64128}};
    for (const auto& [code_bits, vocab_size, words] : rows) {
        Fields fields(3, code_bits, vocab_size);
        Plugin plugin(Create(creator, fields));
        const PluginTensorDesc out = Tensor(DataType::kFLOAT, {vocab_size});
        for (const int32_t wrong : {0, -4, 4}) {
            const PluginTensorDesc in[] = {Tensor(DataType::kFLOAT, {6}), Tensor(DataType::kINT32, {3, words + wrong})};
            const bool accepted = plugin.runtime->onShapeChange(in, 2, &out, 1) == 0;
            CHECK(accepted == (wrong == 0), << code_bits << " bits, V=" << vocab_size << ", words " << words + wrong);
        }
        CHECK(library.messages.Take().size() == 2);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: %s libvq_trt.so\n", argv[0]), 2;
    Library library(argv[1]);
    IPluginCreatorV3One* creator = library.Creator();
    TestFormats(library, creator);
    TestOutputTypes(library, creator);
    TestOutputShapes(library, creator);
    TestSizes(library, creator);
    TestUnknownSizes(library, creator);
    TestPackedWidths(library, creator);
    return check::Done("tensorrt tensors");
}
