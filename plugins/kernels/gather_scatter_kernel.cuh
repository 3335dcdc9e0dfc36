// The VQGatherScatter kernel: gathers code logits from shared memory, sums over codebooks, stores 16 bytes at a time.
//
// tests/native/cuda_on_host.h compiles this file with a C++ compiler too and runs it there.
#pragma once

#include "gather_scatter_plan.h"
#include "pack.cuh"

namespace vq {

// Everything that a kernel is told. Pointers as in launch.h; codes_stride: ids from one codebook to the next.
struct GatherScatterKernelArgs {
    const void* code_logits;
    const void* codes;
    const void* bias;
    void* logits;
    GatherScatterShape shape;
    int64_t codes_stride;
    GatherScatterPlan plan;
};

namespace device {

// Copies `codes` code logits of R rows, [R, codes] with `row_stride` between rows, to table [codes][R]: one load then
// has a code's value for every row. Rows from `rows` on do not exist and are left as zeros. W codes a load, and several
// loads before the first store, because each waits for memory.
template <int W, typename T, int R>
__device__ __forceinline__ void Stage(const T* source, int64_t row_stride, int rows, int codes, Pack<T, R>* table) {
    constexpr int kBatch = R < 8 ? 4 : 2;
    const int step = static_cast<int>(blockDim.x * blockDim.y) * W;
    const int begin = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) * W;
#pragma unroll 1
    for (int i = begin; i < codes; i += kBatch * step) {
        Pack<T, W> in[kBatch][R] = {};
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int at = i + b * step;
                if (at < codes && r < rows) in[b][r] = LoadConstant<Pack<T, W>>(source + r * row_stride + at);
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (i + b * step >= codes) break;
            Pack<T, R>* const to = table + i + b * step;
            if constexpr (R == 1) {
                StoreShared(in[b][0], to);
            } else {
#pragma unroll
                for (int w = 0; w < W; ++w) {
                    Pack<T, R> out;
#pragma unroll
                    for (int r = 0; r < R; ++r) out.x[r] = in[b][r].x[w];
                    StoreShared(out, to + w);
                }
            }
        }
    }
}

// A thread's tokens in one tile: side by side with vector stores, else a block's width apart. Tokens beyond the
// vocabulary are there in the arithmetic only: they read another token's id and are never stored.
template <bool kVector, int N>
struct Tokens {
    int64_t start;  // of the tile; the rest fits in 32 bits
    int count;      // tokens from there to the end of the vocabulary, if that is in this tile

    __device__ __forceinline__ Tokens(int64_t tile, int64_t vocab_size) : start(tile * (blockDim.x * N)) {
        const int64_t left = vocab_size - start, all = blockDim.x * N;
        count = static_cast<int>(left < all ? left : all);
    }

    __device__ __forceinline__ int At(int j) const {
        return static_cast<int>(kVector ? threadIdx.x * N + j : threadIdx.x + j * blockDim.x);
    }

    template <typename U>
    __device__ __forceinline__ Pack<U, N> Load(const U* from) const {
        if constexpr (kVector) {
            // V is a multiple of N here: a thread has all of its tokens or none.
            return LoadConstant<Pack<U, N>>(from + start + (At(0) < count ? At(0) : 0));
        } else {
            Pack<U, N> out;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                out.x[j] = LoadConstant<Pack<U, 1>>(from + start + (At(j) < count ? At(j) : 0)).x[0];
            }
            return out;
        }
    }

    template <typename T>
    __device__ __forceinline__ void StoreSums(const float (&sum)[N], T* to) const {
        if constexpr (kVector) {
            Pack<T, N> out;
#pragma unroll
            for (int j = 0; j < N; j += 2) RoundPair(sum[j], sum[j + 1], out.x + j);
            if (At(0) < count) StoreGlobal(out, to + start + At(0));
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (At(j) < count) Round(sum[j], to + start + At(j));
            }
        }
    }
};

// Adds up what the threads of one token summed, into those of threadIdx.y == 0. partial [split - 1, N, threads].
template <int N>
__device__ __forceinline__ void AddSplit(float (&sum)[N], float* partial) {
    const unsigned width = blockDim.x;
    if (threadIdx.y > 0) {
#pragma unroll
        for (int j = 0; j < N; ++j) partial[((threadIdx.y - 1) * N + j) * width + threadIdx.x] = sum[j];
    }
    __syncthreads();
    if (threadIdx.y == 0) {
#pragma unroll 1
        for (unsigned y = 0; y + 1 < blockDim.y; ++y) {
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] += partial[(y * N + j) * width + threadIdx.x];
        }
    }
    __syncthreads();  // the next tile writes partial again
}

// T: type of the logits. Code: of the packed ids. R: rows_per_block. kVector: vector_stores. kStaged: chunk > 0.
template <typename T, typename Code, int R, bool kVector, bool kStaged>
__global__ void __launch_bounds__(plan::kMaxThreads) GatherScatter(GatherScatterKernelArgs args) {
    constexpr int N = plan::kStoreBytes / sizeof(T);  // tokens of a thread
    // Codebooks whose ids are fetched at once; ids that are loaded one by one take a register each.
    constexpr int kBatch = !kVector ? 1 : R == 1 ? 4 : R == 2 ? 2 : 1;
    extern __shared__ uint4 gather_scatter_shared[];
    [[maybe_unused]] auto* table = reinterpret_cast<Pack<T, R>*>(gather_scatter_shared);
    [[maybe_unused]] auto* partial =
        reinterpret_cast<float*>(gather_scatter_shared + args.plan.table_bytes / plan::kStoreBytes);

    const int64_t m_count = args.shape.num_codebooks, v_count = args.shape.vocab_size;
    const int k_count = static_cast<int>(args.shape.num_codes);
    const int64_t row_stride = m_count * k_count;
    const int64_t chunk = kStaged ? args.plan.chunk : m_count;
    const auto* codes = static_cast<const Code*>(args.codes);
    const T* const bias = threadIdx.y == 0 ? static_cast<const T*>(args.bias) : nullptr;
    auto* logits = static_cast<T*>(args.logits);

    const int64_t first_tile = blockIdx.x * args.plan.tiles_per_block;
    const int64_t next_part = first_tile + args.plan.tiles_per_block;
    const int64_t end_tile = next_part < args.plan.tiles ? next_part : args.plan.tiles;

    for (int64_t group = blockIdx.y; group < args.plan.groups; group += gridDim.y) {
        const int64_t row = group * R, rows_left = args.shape.rows - row;
        const int rows = rows_left < R ? static_cast<int>(rows_left) : R;
        const T* source = static_cast<const T*>(args.code_logits) + row * row_stride;

        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            const Tokens<kVector, N> tokens(tile, v_count);
            // Ids are fetched a batch ahead: the first while the code logits are on their way to shared memory. A
            // thread has codebook threadIdx.y of every blockDim.y.
            const int64_t step = blockDim.y;
            const auto fetch = [&](Pack<Code, N>(&ids)[kBatch], int64_t m) {
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    const int64_t at = m + b * step;
                    if (at < m_count) ids[b] = tokens.Load(codes + at * args.codes_stride);
                }
            };
            int64_t m = threadIdx.y;
            Pack<Code, N> ids[kBatch] = {};
            fetch(ids, m);
            float sum[R][N] = {};
            if (bias != nullptr) {
                const Pack<T, N> b = tokens.Load(bias);
#pragma unroll
                for (int r = 0; r < R; ++r) {
#pragma unroll
                    for (int j = 0; j < N; ++j) sum[r][j] = Widen(b.x[j]);
                }
            }

            for (int64_t first = 0; first < m_count; first += chunk) {
                const int64_t end = first + chunk < m_count ? first + chunk : m_count;
                if constexpr (kStaged) {
                    if (chunk < m_count || tile == first_tile) {
                        __syncthreads();  // others may still gather from what is overwritten here
                        constexpr int W = R == 1 ? N : 2;
                        const int count = static_cast<int>(end - first) * k_count;
                        if (k_count % W == 0) {
                            Stage<W>(source + first * k_count, row_stride, rows, count, table);
                        } else {
                            Stage<1>(source + first * k_count, row_stride, rows, count, table);
                        }
                        __syncthreads();
                    }
                }
#pragma unroll 1
                while (m < end) {
                    Pack<Code, N> next[kBatch] = {};
                    fetch(next, m + kBatch * step);
#pragma unroll
                    for (int b = 0; b < kBatch; ++b) {
                        const int64_t at = m + b * step;
                        if (at < first || at >= end) continue;  // a batch may lie across two chunks
#pragma unroll
                        for (int j = 0; j < N; ++j) {
                            if constexpr (kStaged) {
                                const auto value =
                                    LoadShared(table + static_cast<int>(at - first) * k_count + ids[b].x[j]);
#pragma unroll
                                for (int r = 0; r < R; ++r) sum[r][j] += Widen(value.x[r]);
                            } else {
                                sum[0][j] += Widen(LoadConstant<Pack<T, 1>>(source + at * k_count + ids[b].x[j]).x[0]);
                            }
                        }
                    }
                    if (m + (kBatch - 1) * step >= end) break;
                    m += kBatch * step;
#pragma unroll
                    for (int b = 0; b < kBatch; ++b) ids[b] = next[b];
                }
            }

            if constexpr (R == 1) {
                if (blockDim.y > 1) AddSplit(sum[0], partial);
            }
            if (threadIdx.y == 0) {
                T* to = logits + row * v_count;
#pragma unroll
                for (int r = 0; r < R; ++r, to += v_count) {
                    if (r < rows) tokens.StoreSums(sum[r], to);
                }
            }
        }
    }
}

}  // namespace device
}  // namespace vq
