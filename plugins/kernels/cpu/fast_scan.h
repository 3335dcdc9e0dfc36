// Top-k of a product head, most tokens looked up in eight bits: for instruction sets that look bytes up (isa.h).
//
// All tokens are summed from the upper byte of each score first, in the manner of fast-scan product quantisation. What
// that leaves out is bounded, so that only tokens that can still be among the k best are summed in float32: values and
// ids are those of a full pass. The normaliser is a sum over all tokens; those that hold most of it are summed in
// float32 too, until four standard deviations of what is left out of the others are below 2^-11 of the sum, which is
// what rounding a probability to float16 does to it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/dispatch.h"
#include "cpu/packed_codes.h"

namespace vq::cpu {

class FastScan {
public:
    // Whether there is such a path for a head (none where biases are NaN, which would have to show in logsumexp): it
    // needs PackedCodes::by_token.
    static bool Has(const PackedCodes& codes, const Kernels& kernels);

    // ... for so many codes, and rows, of which many are quicker summed in full together.
    static bool Serves(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t rows);

    // What a call needs, some 4 to 8 bytes a token, which stay in the second cache. Calls hand it on to each other:
    // fresh memory would cost a page fault every 4 KiB.
    struct Scratch {
        Bytes planes;
        std::vector<float> sums;     // [blocks * kBlock], -infinity behind the last token
        std::vector<float> peaks;    // [groups]: the largest sum
        std::vector<int32_t> found;  // [V]: room for picks
        std::vector<int32_t> picks;  // tokens that are looked at once more, and of each:
        std::vector<float> rough;    // its sum x
        std::vector<float> shares;   // exp(x - peak)
        std::vector<float> exact;    // its sum in float32
        std::vector<float> order;    // numbers to find the k-th of
    };

    // All must outlive this.
    FastScan(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t k,
             const ParallelFor& parallel, int64_t threads, Scratch& scratch);

    // scores float32 [M*K] -> values [k] and ids [k] as TopK::Run orders them, and the logsumexp of all V. False, and
    // nothing done, for a row that fixed point cannot hold or not finely enough.
    bool Row(const float* scores, float* values, int64_t* ids, float* logsumexp);

private:
    void ScanAll();
    double MassOfAll() const;
    double LeftOut(double mass) const;
    bool Pick(double mass);
    void Collect(float least);
    void SumPicked(const float* scores);
    float KthLargest(const std::vector<float>& x, float least);
    float* Sums(int64_t group) const { return s_.sums.data() + group * kGroup; }

    const PackedCodes& codes_;
    const Kernels& kernels_;
    int64_t num_codes_, k_;
    const ParallelFor& parallel_;
    int64_t threads_, groups_;
    Scratch& s_;
    FixedPoint fixed_;
    float error_ = 0.0f, peak_ = 0.0f;
};

}  // namespace vq::cpu
