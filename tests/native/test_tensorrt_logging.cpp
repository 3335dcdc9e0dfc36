// Where messages go: to the logger of the TensorRT that loaded the library, whichever version that is and whichever
// headers the library was compiled with; else to stderr.
#include <unistd.h>

#include <stdexcept>

#include "tensorrt_host.h"
#include "tensorrt_loggers.h"

namespace {

using host::Create;
using host::Fields;
using host::Library;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::TensorRTPhase;

constexpr char kMessage[] = "VQGatherScatter createPlugin: node node: field code_bits is 7, expected 8 or 16";

// What `call` writes to stderr.
template <typename Call>
std::string Stderr(const Call& call) {
    std::FILE* file = std::tmpfile();
    const int saved = dup(STDERR_FILENO);
    dup2(fileno(file), STDERR_FILENO);
    call();
    std::fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(saved);
    std::rewind(file);
    char text[4096] = {};
    const size_t size = std::fread(text, 1, sizeof(text) - 1, file);
    std::fclose(file);
    return std::string(text, size);
}

class NoLogger final : public nvinfer1::ILoggerFinder {
public:
    explicit NoLogger(bool throws) : throws_(throws) {}
    nvinfer1::ILogger* findLogger() override {
        if (throws_) throw std::runtime_error("no logger here");
        return nullptr;
    }

private:
    const bool throws_;
};

void TestLoggerFallback(Library& library, IPluginCreatorV3One* creator) {
    NoLogger none(false), throws(true);
    auto* unknown = static_cast<nvinfer1::ILoggerFinder*>(loggers::UnknownFinder());
    nvinfer1::ILoggerFinder* finders[] = {nullptr, &none, &throws, unknown};
    for (nvinfer1::ILoggerFinder* finder : finders) {
        library.set_logger_finder(finder);
        Fields fields(2, 7, 7);
        const std::string text = Stderr([&] { CHECK(Create(creator, fields) == nullptr); });
        CHECK(text == std::string(kMessage) + "\n", << text);
    }
    library.set_logger_finder(&library.messages);
    CHECK_QUIET(library);
    // A name of any length: the message is cut, not the stack.
    Fields fields(2, 7, 7);
    CHECK(creator->createPlugin(std::string(5000, 'x').c_str(), fields.Collection(), TensorRTPhase::kBUILD) == nullptr);
    CHECK_LOGGED(library, std::string(500, 'x'));
}

// A version-compatible plan of TensorRT 10 that carries the library is run by 11: the library must know the difference.
void TestBothVersions(Library& library, IPluginCreatorV3One* creator) {
    std::vector<std::string> messages;
    for (void* finder : {loggers::Finder10(&messages), loggers::Finder11(&messages)}) {
        messages.clear();
        library.set_logger_finder(static_cast<nvinfer1::ILoggerFinder*>(finder));
        Fields fields(2, 7, 7);
        const std::string text = Stderr([&] { CHECK(Create(creator, fields) == nullptr); });
        CHECK(text.empty(), << text);
        CHECK(messages.size() == 1 && messages[0] == std::string("1 ") + kMessage, << messages.size());
    }
    library.set_logger_finder(&library.messages);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: %s libvq_trt.so\n", argv[0]), 2;
    Library library(argv[1]);
    IPluginCreatorV3One* creator = library.Creator();
    TestLoggerFallback(library, creator);
    TestBothVersions(library, creator);
    return check::Done("tensorrt logging");
}
