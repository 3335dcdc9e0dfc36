// The CUDA kernels on a GPU, against the host reference in double: small sizes that take every kind of plan, so that
// compute-sanitizer can run over all of it. Exit code 77, which CTest counts as skipped, where there is no GPU.
#include <cuda_runtime_api.h>

#include "device_bytes.h"
#include "gather_scatter_case.h"
#include "vq/launch.h"

namespace {

using device_bytes::DeviceBytes;
using device_bytes::Ok;
using gather_scatter_case::Case;
using gather_scatter_case::kGuard;
using vq::Type;

// offset: bytes by which the logits are off a 16-byte boundary.
void Run(const Case& c, size_t offset, cudaStream_t stream) {
    auto logits = c.PoisonedLogits(offset);
    const DeviceBytes code_logits(c.code_logits.data(), c.code_logits.size()), bias(c.bias.data(), c.bias.size());
    const DeviceBytes words(c.words.data(), c.words.size() * sizeof(uint32_t)), out(logits.data(), logits.size());
    const vq::GatherScatterArgs args{
        code_logits.data(), words.data(), bias.data(), out.data() + kGuard + offset, c.shape, c.code_bits, c.type};
    Ok(cudaDeviceSynchronize(), "copies");  // the stream does not wait for them
    Ok(vq::LaunchVQGatherScatter(args, stream), "launch");
    if (!Ok(cudaStreamSynchronize(stream), Name(c).c_str())) return;
    out.Read(logits.data());
    c.Check(logits, offset, Name(c));
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("cuda_device: skipped, no CUDA device\n");
        return 77;
    }
    cudaStream_t stream = nullptr;
    if (!Ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream")) return check::Done("cuda_device");
    // Rows from a decode step to a prefill; codebooks that fit in shared memory, come in chunks, or fit nowhere.
    const vq::GatherScatterShape shapes[] = {{0, 1, 5, 17},       {1, 1, 1, 1},         {1, 1, 4096, 12800},
                                             {1, 200, 256, 999},  {3, 5, 257, 2056},    {8, 1, 1280, 20000},
                                             {257, 1, 300, 4099}, {129, 33, 100, 1024}, {16, 24, 4096, 6000},
                                             {5, 2, 65536, 3001}, {3001, 2, 17, 512}};
    uint32_t seed = 1;
    for (const auto& shape : shapes) {
        for (const Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16}) {
            for (const size_t offset : {size_t{0}, static_cast<size_t>(vq::SizeOf(type))}) {
                Run(Case(shape, type, vq::CodeBits(shape.num_codes), seed % 2 == 0, seed), offset, stream);
                ++seed;
            }
        }
    }
    vq::GatherScatterArgs wrong{};
    wrong.shape = {1, 1, 1, 1};
    wrong.code_bits = 7;
    CHECK(vq::LaunchVQGatherScatter(wrong, stream) == cudaErrorInvalidValue);
    cudaStreamDestroy(stream);
    return check::Done("cuda_device");
}
