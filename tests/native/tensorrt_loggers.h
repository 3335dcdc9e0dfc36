// Loggers and their finders as TensorRT 10 and TensorRT 11 make them, whatever headers the tests are compiled with.
#pragma once

#include <string>
#include <vector>

namespace loggers {

// Each collects into `messages`. Returns: what TensorRT of that version hands to setLoggerFinder; lives on.
void* Finder10(std::vector<std::string>* messages);
void* Finder11(std::vector<std::string>* messages);

// A finder of no version known: none of its methods may be called.
void* UnknownFinder();

}  // namespace loggers
