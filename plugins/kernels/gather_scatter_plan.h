// How one VQGatherScatter is cut into blocks: plain host code, so that the choice can be tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vq/shape.h"

namespace vq {

// What the choice has to know of a GPU.
struct GpuLimits {
    int32_t multiprocessors;
    int32_t shared_per_multiprocessor;  // bytes
    int32_t shared_per_block;           // bytes, after opting in
};

// Rows come in groups of R, tokens in tiles: 16 bytes of a row's logits for every thread of blockDim.x. A block has a
// row group (several, where a grid has too few blocks) and one part of the vocabulary, tiles_per_block tiles.
struct GatherScatterPlan {
    int32_t rows_per_block;  // R: rows that share one read of the codes; 1, 2, 4 or 8
    bool vector_stores;      // 16-byte stores; else element by element, consecutive lanes on consecutive tokens
    int32_t threads;         // blockDim.x
    int32_t split;           // blockDim.y: threads that share a token's codebooks; above 1 only where R is 1
    int64_t chunk;  // codebooks in shared memory at once; 0: none fits, code logits are read through the caches
    int64_t tiles;  // of the whole vocabulary
    int64_t tiles_per_block;  // of one part of the vocabulary
    int32_t parts;            // of the vocabulary: gridDim.x
    int64_t groups;           // of rows
    int32_t grid_groups;      // gridDim.y: groups, or as many as a grid may have
    int32_t table_bytes;      // shared memory of the staged code logits
    int32_t shared_bytes;     // table_bytes and the partial sums of the split
};

namespace plan {

inline constexpr int32_t kStoreBytes = 16;   // widest store of a thread, and its share of a tile per row
inline constexpr int32_t kMaxThreads = 512;  // per block
inline constexpr int32_t kMaxSplit = 4;
inline constexpr int32_t kResidentBlocks = 2;     // per multiprocessor, so that one stages while others store
inline constexpr int32_t kReservedShared = 1024;  // bytes that CUDA keeps of every block's shared memory
inline constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
inline constexpr int64_t kMaxGridY = 65535;

inline constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Tokens of one thread in one tile.
inline constexpr int32_t TokensPerThread(Type type) { return static_cast<int32_t>(kStoreBytes / SizeOf(type)); }

// Shared memory that a block may take when `blocks` of them come: few blocks may each take more.
inline int64_t SharedBudget(const GpuLimits& gpu, int64_t blocks) {
    const int64_t resident = std::clamp<int64_t>(CeilDiv(blocks, gpu.multiprocessors), 1, kResidentBlocks);
    return std::min<int64_t>(gpu.shared_per_block, gpu.shared_per_multiprocessor / resident - kReservedShared);
}

// Partial sums of all but one of the threads that share a token, in float32.
inline constexpr int64_t PartialBytes(int64_t split, int64_t threads, Type type) {
    return (split - 1) * threads * TokensPerThread(type) * int64_t{sizeof(float)};
}

}  // namespace plan

// Fills everything that follows from R, vector_stores, threads, split and the number of vocabulary parts aimed at.
inline void CompletePlan(GatherScatterPlan& p, const GatherScatterShape& shape, Type type, int64_t chunk,
                         int64_t parts) {
    p.chunk = chunk;
    p.tiles = plan::CeilDiv(shape.vocab_size, int64_t{p.threads} * plan::TokensPerThread(type));
    p.tiles_per_block = plan::CeilDiv(p.tiles, std::clamp<int64_t>(parts, 1, std::min(p.tiles, plan::kMaxGridX)));
    p.parts = static_cast<int32_t>(plan::CeilDiv(p.tiles, p.tiles_per_block));
    p.groups = plan::CeilDiv(shape.rows, p.rows_per_block);
    p.grid_groups = static_cast<int32_t>(std::min(p.groups, plan::kMaxGridY));
    const int64_t table = chunk * shape.num_codes * p.rows_per_block * SizeOf(type);
    p.table_bytes = static_cast<int32_t>(plan::RoundUp(table, plan::kStoreBytes));
    p.shared_bytes = static_cast<int32_t>(p.table_bytes + plan::PartialBytes(p.split, p.threads, type));
}

// Args: shape with rows >= 1; logits_aligned: the output pointer is 16-byte aligned.
inline GatherScatterPlan PlanGatherScatter(const GatherScatterShape& shape, Type type, bool logits_aligned,
                                           const GpuLimits& gpu) {
    const int64_t codebook_bytes = shape.num_codes * SizeOf(type);  // of one row
    const int64_t all_bytes = shape.num_codebooks * codebook_bytes;
    const int64_t lanes = plan::CeilDiv(shape.vocab_size, plan::TokensPerThread(type));  // threads for one row group
    const int64_t all_sms = gpu.multiprocessors;
    const int64_t full_budget = plan::SharedBudget(gpu, all_sms * plan::kResidentBlocks);

    GatherScatterPlan p{};
    p.vector_stores = logits_aligned && shape.vocab_size * SizeOf(type) % plan::kStoreBytes == 0;

    // Rows share a read of the codes as long as enough threads remain to fill the GPU. Once two rows lie in shared
    // memory with all their codebooks, more rows are not worth staging the codebooks anew for every tile.
    p.rows_per_block = 1;
    for (int32_t wider = 2; wider <= plan::TokensPerThread(type) && wider <= shape.rows; wider *= 2) {
        if (lanes * plan::CeilDiv(shape.rows, wider) < all_sms * 256) break;
        if (codebook_bytes * wider > full_budget) break;
        if (wider > 2 && all_bytes * p.rows_per_block <= full_budget && all_bytes * wider > full_budget) break;
        p.rows_per_block = wider;
    }
    const int64_t groups = plan::CeilDiv(shape.rows, p.rows_per_block);
    const int64_t widest = lanes * groups >= all_sms * 512 ? 256 : 128;
    p.threads = static_cast<int32_t>(std::min(widest, plan::RoundUp(lanes, 32)));

    // A decode step has one row: with many codebooks, more threads per token keep more reads of code ids in flight.
    p.split = 1;
    while (p.rows_per_block == 1 && p.split < plan::kMaxSplit && p.split * 2 <= shape.num_codebooks &&
           lanes * groups * p.split < all_sms * 512) {
        p.split *= 2;
    }

    const int64_t tiles = plan::CeilDiv(lanes, p.threads);
    const int64_t budget = plan::SharedBudget(gpu, groups * tiles) - plan::PartialBytes(p.split, p.threads, type);
    const int64_t fitting = std::min(shape.num_codebooks, budget / (codebook_bytes * p.rows_per_block));
    // Chunks of one size: a last chunk of a few codebooks costs as many barriers as a full one.
    const int64_t chunk =
        fitting < 1 ? 0 : plan::CeilDiv(shape.num_codebooks, plan::CeilDiv(shape.num_codebooks, fitting));

    // Every part of the vocabulary stages the code logits again: as many parts as fill the GPU, and beyond that (more
    // blocks even out their ends) only while a part has eight tokens for every code that it stages.
    const int64_t filling = plan::CeilDiv(all_sms * plan::kResidentBlocks, groups);
    const int64_t cheap = shape.vocab_size / (8 * shape.num_codes);
    CompletePlan(p, shape, type, chunk, std::max(filling, std::min(cheap, all_sms * 16 / groups)));
    return p;
}

}  // namespace vq
