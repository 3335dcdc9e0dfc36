// vq_run_trt out/engines/<gpu>-<tensorrt>/vq-plugin.plan 5 9 40 --library out/lib/libvq_trt.so
#include "run.h"
#include "trt_decoder.h"

int main(int argc, char** argv) { return vq::Run<vq::TrtDecoder>(argc, argv, vq::kTensorRtLibrary); }
