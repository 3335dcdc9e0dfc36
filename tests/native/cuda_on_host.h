// Runs CUDA kernels on the host, so that the kernels' own source is tested where there is no GPU.
//
// Include this before a .cuh and compile with a C++ compiler. A kernel runs block by block; the threads of a block are
// fibers that a barrier suspends, resumed in one order and in the reverse one, turn about: what a missing barrier lets
// slip shows as a wrong result. Dynamic shared memory starts poisoned and ends where the launch said, which
// AddressSanitizer watches. What runs: one launch at a time, __syncthreads, plain code; no warp intrinsics, no atomics.
#pragma once

#define CUDA_NO_HALF  // no type named half: the tests have a namespace of that name

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_types.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

template <typename T>
T __ldg(const T* from) {
    return *from;
}

template <typename T>
void __stcs(T* to, T value) {
    *to = value;
}

namespace cuda_on_host {

inline constexpr size_t kMaxShared = 256 << 10;
inline constexpr size_t kStackBytes = 128 << 10;
inline constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

struct Fiber {
    ucontext_t context;
    void* stack = nullptr;
    uint3 thread{};
    bool done = false;
};

struct Block {
    std::vector<Fiber> fibers;
    ucontext_t scheduler{};
    Fiber* running = nullptr;
    std::function<void()> kernel;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
};

inline Block block;

// AddressSanitizer has to be told when the stack changes.
inline void Leave(void** fake_stack, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
    (void)fake_stack, (void)stack, (void)bytes;
#endif
}

inline void Arrive(void* fake_stack, const void** old_stack, size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_bytes);
#else
    (void)fake_stack, (void)old_stack, (void)old_bytes;
#endif
}

inline void Suspend() {
    Fiber* self = block.running;
    void* fake_stack = nullptr;
    Leave(self->done ? nullptr : &fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
    swapcontext(&self->context, &block.scheduler);
    Arrive(fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
}

inline void FiberMain() {
    Arrive(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
    block.kernel();
    block.running->done = true;
    Suspend();
}

inline void Resume(Fiber& fiber) {
    block.running = &fiber;
    threadIdx = fiber.thread;
    void* fake_stack = nullptr;
    Leave(&fake_stack, fiber.stack, kStackBytes);
    swapcontext(&block.scheduler, &fiber.context);
    Arrive(fake_stack, nullptr, nullptr);
}

// Runs every thread to its next barrier or its end; false when all have ended.
inline bool Phase(bool reverse) {
    size_t waiting = 0;
    const size_t count = block.fibers.size();
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = block.fibers[reverse ? count - 1 - i : i];
        Resume(fiber);
        waiting += !fiber.done;
    }
    if (waiting != 0 && waiting != count) {
        std::fprintf(stderr, "%zu of %zu threads wait at a barrier that the others never reach\n", waiting, count);
        std::abort();
    }
    return waiting != 0;
}

inline void StartFiber(Fiber& fiber, unsigned index) {
    if (fiber.stack == nullptr) {
        fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fiber.stack == MAP_FAILED) std::abort();
    }
    fiber.thread = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, FiberMain, 0);
}

// Launches kernel(arguments...); `shared` is where the kernel's extern __shared__ array lives, kMaxShared bytes.
template <typename Kernel, typename... Arguments>
void Launch(dim3 grid, dim3 threads, size_t shared_bytes, void* shared, Kernel kernel, const Arguments&... arguments) {
    if (shared_bytes > kMaxShared) std::abort();
    gridDim = grid;
    blockDim = threads;
    block.kernel = [&] { kernel(arguments...); };
    block.fibers.resize(threads.x * threads.y * threads.z);
    bool reverse = false;
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(static_cast<unsigned char*>(shared) + shared_bytes, kMaxShared - shared_bytes);
#endif
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                std::memset(shared, kPoison, shared_bytes);
                for (unsigned i = 0; i < block.fibers.size(); ++i) StartFiber(block.fibers[i], i);
                while (Phase(reverse)) reverse = !reverse;
                reverse = !reverse;
            }
        }
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared, kMaxShared);
#endif
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Suspend(); }
