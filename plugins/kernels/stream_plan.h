// How the pass over packed codes that VQTopK and VQSample make is cut into blocks: plain host code.
#pragma once

#include "gather_scatter_plan.h"

namespace vq {

// A block takes one row and one part of the vocabulary: whole tiles, one after another. In a tile every thread loads 16
// bytes of code ids of a codebook at a time, so it sums the logits of 16 or 8 tokens; `split` threads share a token's
// codebooks, because a decode step has one row and few tokens for a large GPU.
struct StreamPlan {
    int32_t threads;       // of a block, a multiple of 32 * split
    int32_t split;         // a power of two
    int64_t chunk;         // codebooks whose code logits are in shared memory at once; 0: read through the caches
    int64_t tiles;         // of the whole vocabulary
    int64_t per_part;      // tiles of one part
    int32_t parts;         // of the vocabulary, kMaxParts at most
    int32_t sum_bytes;     // shared memory of a tile's sums
    int32_t shared_bytes;  // all of it
};

namespace plan {

inline constexpr int32_t kStreamThreads = 512;
inline constexpr int32_t kFewestThreads = 128;
inline constexpr int32_t kMaxStreamSplit = 8;
inline constexpr int64_t kMaxParts = 256;  // of a row: what a workspace holds room for
inline constexpr int32_t kScratchBytes = 12
                                         << 10;  // shared memory of what is done with the logits (block.cuh, best.cuh)

// Tokens whose ids fill 16 bytes.
inline constexpr int32_t StreamTokens(int32_t code_bits) { return 128 / code_bits; }

inline constexpr int64_t TileTokens(const StreamPlan& p, int32_t code_bits) {
    return int64_t{p.threads} / p.split * StreamTokens(code_bits);
}

// A tile's sums lie token by token, a row of lanes and one more word each, so that neither those who write sums nor
// those who read tokens in order meet in one bank.
inline constexpr int64_t SumBytes(const StreamPlan& p, int32_t code_bits) {
    const int64_t lanes = p.threads / p.split;
    return RoundUp(p.split * StreamTokens(code_bits) * (lanes + 1) * int64_t{sizeof(float)}, kStoreBytes);
}

// Parts of all rows together, whatever the plan: rows only share a GPU while there are fewer of them than parts.
inline constexpr int64_t MostParts(int64_t rows) { return rows + kMaxParts; }

}  // namespace plan

// Fills everything that follows from threads, split and the number of parts aimed at.
inline void CompleteStreamPlan(StreamPlan& p, const GatherScatterShape& shape, Type type, int32_t code_bits,
                               int64_t parts, int64_t shared_per_block) {
    const int64_t tile = plan::TileTokens(p, code_bits);
    p.tiles = plan::CeilDiv(shape.vocab_size, tile);
    p.per_part = plan::CeilDiv(p.tiles, std::clamp<int64_t>(parts, 1, std::min(p.tiles, plan::kMaxParts)));
    p.parts = static_cast<int32_t>(plan::CeilDiv(p.tiles, p.per_part));
    p.sum_bytes = static_cast<int32_t>(plan::SumBytes(p, code_bits));
    const int64_t codebook_bytes = shape.num_codes * SizeOf(type);
    const int64_t room = shared_per_block - plan::kReservedShared - plan::kScratchBytes - p.sum_bytes;
    const int64_t fitting = std::min(shape.num_codebooks, room / codebook_bytes);
    // Staging reads every code logit; with few tokens for each, reading what the tokens name is less.
    p.chunk = fitting < 1 || shape.num_codes > 4 * p.per_part * tile
                  ? 0
                  : plan::CeilDiv(shape.num_codebooks, plan::CeilDiv(shape.num_codebooks, fitting));
    p.shared_bytes = static_cast<int32_t>(plan::kScratchBytes + p.sum_bytes +
                                          plan::RoundUp(p.chunk * codebook_bytes, plan::kStoreBytes));
}

// Args: shape with rows >= 1; code_bits 8 or 16.
inline StreamPlan PlanStream(const GatherScatterShape& shape, Type type, int32_t code_bits, const GpuLimits& gpu) {
    // One large block a multiprocessor: product heads fill its shared memory with code logits, and each block more
    // stages them again (M=144, K=256 in float16: 74 KB from the L2 cache for about as many bytes of codes).
    StreamPlan p{};
    p.threads = plan::kStreamThreads;
    p.split = 1;
    const auto blocks = [&] { return shape.rows * plan::CeilDiv(shape.vocab_size, plan::TileTokens(p, code_bits)); };
    while (blocks() < gpu.multiprocessors && p.split < plan::kMaxStreamSplit && p.split * 2 <= shape.num_codebooks) {
        p.split *= 2;
    }
    while (blocks() < gpu.multiprocessors && p.threads > plan::kFewestThreads && p.threads > 32 * p.split) {
        p.threads /= 2;
    }
    const int64_t filling = plan::CeilDiv(std::min<int64_t>(gpu.multiprocessors, plan::kMaxParts), shape.rows);
    CompleteStreamPlan(p, shape, type, code_bits, filling, gpu.shared_per_block);
    return p;
}

}  // namespace vq
