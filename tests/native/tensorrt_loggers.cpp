// No header of TensorRT is included: these are its classes as the two versions declare them, cut down to the methods
// that are called, in their order.
#include "tensorrt_loggers.h"

#include <cstdint>
#include <cstdlib>

namespace nvinfer1 {

struct InterfaceInfo {
    const char* kind;
    int32_t major;
    int32_t minor;
};

class IVersionedInterface {
public:
    virtual int32_t getAPILanguage() const noexcept { return 0; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

class ILogger;

class ILoggerFinder {
public:
    virtual ILogger* findLogger() = 0;

protected:
    virtual ~ILoggerFinder() = default;
};

namespace v_1_0 {

class ILogger;

class ILoggerFinder : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
    virtual ILogger* findLogger() = 0;
};

}  // namespace v_1_0
}  // namespace nvinfer1

namespace {

class Logger10 {
public:
    explicit Logger10(std::vector<std::string>* messages) : messages_(messages) {}
    virtual void log(int32_t severity, const char* message) noexcept {
        messages_->push_back(std::to_string(severity) + " " + message);
    }
    virtual ~Logger10() = default;

private:
    std::vector<std::string>* messages_;
};

class Logger11 : public nvinfer1::IVersionedInterface {
public:
    explicit Logger11(std::vector<std::string>* messages) : messages_(messages) {}
    nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
    virtual void log(int32_t severity, const char* message) noexcept {
        messages_->push_back(std::to_string(severity) + " " + message);
    }

private:
    std::vector<std::string>* messages_;
};

template <typename Interface, typename LoggerInterface, typename Logger>
class Finder final : public Interface {
public:
    explicit Finder(std::vector<std::string>* messages) : logger_(messages) {}
    LoggerInterface* findLogger() override { return reinterpret_cast<LoggerInterface*>(&logger_); }

private:
    Logger logger_;
};

class Unknown {
public:
    virtual ~Unknown() { std::abort(); }
    virtual void* Method() { std::abort(); }
};

}  // namespace

namespace loggers {

void* Finder10(std::vector<std::string>* messages) {
    static Finder<nvinfer1::ILoggerFinder, nvinfer1::ILogger, Logger10> finder(messages);
    return &finder;
}

void* Finder11(std::vector<std::string>* messages) {
    static Finder<nvinfer1::v_1_0::ILoggerFinder, nvinfer1::v_1_0::ILogger, Logger11> finder(messages);
    return &finder;
}

void* UnknownFinder() {
    static Unknown* const finder = new Unknown;
    return finder;
}

}  // namespace loggers
