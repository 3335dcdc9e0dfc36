// Top-k of a product head, most tokens looked up in eight bits: for instruction sets that look bytes up (isa.h).
//
// All tokens are summed from the upper byte of each score first, in the manner of fast-scan product quantisation. What
// that leaves out is bounded, so that only tokens that can still be among the k best are summed in float32: values and
// ids are those of a full pass. The normaliser is a sum over all tokens; groups of tokens that hold much of it get
// their next byte too, until four standard deviations of what is left out are below 2^-12 of the sum.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/dispatch.h"
#include "cpu/packed_codes.h"

namespace vq::cpu {

class FastScan {
public:
    // Whether there is such a path for this head (none where biases are NaN, which would have to show in logsumexp),
    // and so many rows are not quicker summed in full together.
    static bool Serves(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t rows);

    // What a call needs, some 4 bytes a token, which stay in the second cache. Calls hand it on to each other: fresh
    // memory would cost a page fault every 4 KiB.
    struct Scratch {
        Bytes planes;
        std::vector<float> sums;                    // [blocks * kBlock], -infinity behind the last token
        std::vector<float> peaks, masses, squares;  // [groups]: largest sum x; sums of exp(x - peak) and of its square
        std::vector<uint8_t> refined;               // [groups]
        std::vector<int64_t> heavy;                 // groups to refine
        std::vector<int64_t> tokens;                // those that may be among the k best
        std::vector<float> lows;                    // what groups or tokens have at least
    };

    // All must outlive this.
    FastScan(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t k,
             const ParallelFor& parallel, int64_t threads, Scratch& scratch);

    // scores float32 [M*K] -> values [k] and ids [k] as TopK::Run orders them, and the logsumexp of all V. False, and
    // nothing done, for a row that fixed point cannot hold or not finely enough.
    bool Row(const float* scores, float* values, int64_t* ids, float* logsumexp);

private:
    void ScanAll();
    void RefineWhatWeighs();
    void SumWhatWeighsMost(const float* scores);
    void Refine(const std::vector<int64_t>& groups);
    void PickBest(const float* scores, Candidates& best);
    void Judge(int64_t group);
    double Total() const;
    float KthLow();
    float Exact(const float* scores, int64_t token) const;
    // How far the sums of a group are off at most.
    float Error(int64_t group) const { return s_.refined[static_cast<size_t>(group)] != 0 ? fine_error_ : error_; }
    const uint8_t* Ids(int64_t group) const;  // [M, kGroup]
    float* Sums(int64_t group) { return s_.sums.data() + group * kGroup; }

    const PackedCodes& codes_;
    const Kernels& kernels_;
    int64_t num_codes_, k_;
    const ParallelFor& parallel_;
    int64_t threads_, groups_;
    Scratch& s_;
    FixedPoint fixed_;
    float error_ = 0.0f, fine_error_ = 0.0f, peak_ = 0.0f;
};

}  // namespace vq::cpu
