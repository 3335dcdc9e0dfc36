// vq_run_ort out/model.onnx 5 9 40 --library out/lib/libvq_ort.so
#include "ort_decoder.h"
#include "run.h"

int main(int argc, char** argv) { return vq::Run<vq::OrtDecoder>(argc, argv, "libonnxruntime.so.1"); }
