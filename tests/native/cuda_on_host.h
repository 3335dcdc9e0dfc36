// Runs CUDA kernels on the host, so that the kernels' own source is tested where there is no GPU.
//
// Include this before a .cuh and compile with a C++ compiler. A kernel runs block by block; the threads of a block are
// fibers that a barrier suspends, resumed in one order and in the reverse one, turn about: what a missing barrier lets
// slip shows as a wrong result. Dynamic shared memory starts poisoned and ends where the launch said, which
// AddressSanitizer watches. What runs: one launch at a time, barriers of blocks and warps, shuffles and votes of whole
// warps, atomics; warps are 32 threads of a block of one dimension.
#pragma once

#define CUDA_NO_HALF  // no type named half: the tests have a namespace of that name

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
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

inline constexpr unsigned kWarp = 32;

enum class State { kRuns, kAtBarrier, kDone };

struct Fiber {
    ucontext_t context;
    void* stack = nullptr;
    uint3 thread{};
    State state = State::kRuns;
};

// What the lanes of a warp hand each other: they meet twice, once to write and once to have read.
struct Warp {
    unsigned long long values[kWarp];
    unsigned arrived, meeting;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    int votes = 0, result = 0;  // of __syncthreads_or
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
    Leave(self->state == State::kDone ? nullptr : &fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
    swapcontext(&self->context, &block.scheduler);
    Arrive(fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
}

inline void FiberMain() {
    Arrive(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
    block.kernel();
    block.running->state = State::kDone;
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
    const size_t count = block.fibers.size();
    size_t waiting = 0, done = 0;
    // Threads that wait for others of their warp come to run again until all stand at the block's barrier or are done.
    for (size_t rounds = 0; waiting + done < count; ++rounds) {
        waiting = done = 0;
        for (size_t i = 0; i < count; ++i) {
            Fiber& fiber = block.fibers[reverse ? count - 1 - i : i];
            if (fiber.state == State::kRuns) Resume(fiber);
            waiting += fiber.state == State::kAtBarrier;
            done += fiber.state == State::kDone;
        }
        if (rounds > 1000000) {
            std::fprintf(stderr, "lanes of a warp wait for others that never come\n");
            std::abort();
        }
    }
    if (waiting != 0 && done != 0) {
        std::fprintf(stderr, "%zu of %zu threads wait at a barrier that the others never reach\n", waiting, count);
        std::abort();
    }
    for (Fiber& fiber : block.fibers) {
        if (fiber.state == State::kAtBarrier) fiber.state = State::kRuns;
    }
    block.result = block.votes;
    block.votes = 0;
    return waiting != 0;
}

inline void Barrier() {
    block.running->state = State::kAtBarrier;
    Suspend();
}

inline Warp& MyWarp() { return block.warps[threadIdx.x / kWarp]; }

// Waits for every lane of the warp.
inline void Meet() {
    Warp& warp = MyWarp();
    const unsigned meeting = warp.meeting;
    if (++warp.arrived == kWarp) {
        warp.arrived = 0;
        ++warp.meeting;
    }
    while (warp.meeting == meeting) Suspend();
}

// The value that another lane gives in the same call.
template <typename T>
T Exchange(T value, unsigned lane) {
    static_assert(sizeof(T) <= sizeof(unsigned long long));
    Warp& warp = MyWarp();
    std::memcpy(&warp.values[threadIdx.x % kWarp], &value, sizeof(T));
    Meet();
    std::memcpy(&value, &warp.values[lane], sizeof(T));
    Meet();
    return value;
}

inline void StartFiber(Fiber& fiber, unsigned index) {
    if (fiber.stack == nullptr) {
        fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fiber.stack == MAP_FAILED) std::abort();
    }
    fiber.thread = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
    fiber.state = State::kRuns;
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
    block.warps.assign((block.fibers.size() + kWarp - 1) / kWarp, {});
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

inline void __syncthreads() { cuda_on_host::Barrier(); }

inline int __syncthreads_or(int vote) {
    cuda_on_host::block.votes |= vote;
    cuda_on_host::Barrier();
    return cuda_on_host::block.result;
}

inline void __syncwarp() { cuda_on_host::Meet(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return cuda_on_host::Exchange(value, static_cast<unsigned>(lane));
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
    const unsigned lane = threadIdx.x % cuda_on_host::kWarp;
    return cuda_on_host::Exchange(value, lane >= step ? lane - step : lane);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
    const unsigned lane = threadIdx.x % cuda_on_host::kWarp;
    return cuda_on_host::Exchange(value, lane + step < cuda_on_host::kWarp ? lane + step : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_on_host::Exchange(value, threadIdx.x % cuda_on_host::kWarp ^ static_cast<unsigned>(mask));
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = 0;
    const cuda_on_host::Warp& warp = cuda_on_host::MyWarp();
    cuda_on_host::MyWarp().values[threadIdx.x % cuda_on_host::kWarp] = vote;
    cuda_on_host::Meet();
    for (unsigned lane = 0; lane < cuda_on_host::kWarp; ++lane)
        votes |= static_cast<unsigned>(warp.values[lane]) << lane;
    cuda_on_host::Meet();
    return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}
template <typename T>
T atomicMax(T* to, T value) {
    const T before = *to;
    *to = std::max(before, value);
    return before;
}
template <typename T>
T atomicMin(T* to, T value) {
    const T before = *to;
    *to = std::min(before, value);
    return before;
}
