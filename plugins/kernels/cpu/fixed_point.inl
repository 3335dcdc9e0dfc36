// A row's tables in fixed point, for the instruction sets that look bytes up. Included like generic.inl; vectors of
// sixteen are lowered to what there is.
//
// A row's scores become integers of one unit, cut into planes of bytes. Tokens are looked up plane by plane, and the
// sums are exact integers: M is at most 256, so that a plane's sum fits 16 bits. Most codebooks fit three planes; the
// few whose scores span far more than the others' (after a rotation some always do) have a fourth one, so that they do
// not coarsen the unit of all.

using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using IntLanes = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using ByteLanes = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
using Quad = float __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int64_t kLanes = 16;
constexpr float kLargest = 16777215.0f - 255.0f;  // of three planes; a little less than 2^24 leaves room for rounding
constexpr int64_t kWideShare = 10;                // of so many codebooks one may have the fourth plane
constexpr float kWidest = 250.0f;                 // how much wider than the unit's codebooks the fourth plane reaches

struct Range {
    float low, high;
};

// By quarters: lane by lane, sixteen additions would wait for each other.
inline float Sum(const Lanes& x) {
    const auto* quads = reinterpret_cast<const Quad*>(&x);
    const Quad sum = (quads[0] + quads[1]) + (quads[2] + quads[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline Quad Lower(Quad a, Quad b) { return a < b ? a : b; }

inline float Lowest(const Lanes& x) {
    const auto* quads = reinterpret_cast<const Quad*>(&x);
    const Quad low = Lower(Lower(quads[0], quads[1]), Lower(quads[2], quads[3]));
    const float first = low[0] < low[1] ? low[0] : low[1], second = low[2] < low[3] ? low[2] : low[3];
    return first < second ? first : second;
}

// The last scores of a codebook, fewer than sixteen, and a filler behind them. `readable` floats are there, most often
// the next codebook's. (By reference: a vector wider than the registers has no settled way to be passed.)
inline void LoadLast(const float* scores, int64_t count, int64_t readable, float filler, Lanes& out) {
    if (readable >= kLanes) {
        const IntLanes lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const IntLanes inside = lane < static_cast<int32_t>(count);
        const Lanes fill = Lanes{} + filler;
        out = inside ? *reinterpret_cast<const Lanes*>(scores) : fill;
        return;
    }
    out = Lanes{} + filler;
    for (int64_t i = 0; i < count; ++i) out[i] = scores[i];
}

// body(k, part) for the scores [count] of a codebook, sixteen at a time.
template <typename Body>
inline void ForLanes(const float* scores, int64_t count, int64_t readable, float filler, const Body& body) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) body(k, *reinterpret_cast<const Lanes*>(scores + k));
    if (k == count) return;
    Lanes last;
    LoadLast(scores + k, count - k, readable - k, filler, last);
    body(k, last);
}

// An infinite span where the scores hold infinities or NaN.
Range RangeOf(const float* scores, int64_t count, int64_t readable) {
    Lanes low = Lanes{} + scores[0], high = low, strange{};
    ForLanes(scores, count, readable, scores[0], [&](int64_t, const Lanes& part) {
        low = part < low ? part : low;
        high = part > high ? part : high;
        strange += part - part;  // 0, or NaN for infinities and NaN
    });
    if (!(Sum(strange) == 0.0f)) return {0.0f, __builtin_inff()};
    return {Lowest(low), -Lowest(-high)};
}

// The span that three planes cover: the smallest of a falling series that leaves few enough codebooks above it.
float CoveredSpan(const float* spans, int64_t count) {
    float widest = 0.0f;
    for (int64_t m = 0; m < count; ++m) widest = spans[m] > widest ? spans[m] : widest;
    float covered = widest;
    for (float next = widest; next * kWidest > widest; next *= 0.875f) {
        int64_t above = 0;
        for (int64_t m = 0; m < count; ++m) above += spans[m] > next;
        if (above * kWideShare >= count + kWideShare) break;
        covered = next;
    }
    return covered;
}

// What the lower bytes of a codebook's integers are. The means are over the tokens: some codes have many of them, and a
// mean that is a little wrong is wrong for all tokens at once, in every codebook.
struct LowerBytes {
    double mean;      // of two bytes
    double variance;  // of two bytes about their mean, over the codes: the tokens of rare ones count as well
    double moved;     // over the codes, squared: how much more of the softmax than of the tokens they have
};

// exp(x) within a sixteenth of it, for x of 0 at most; all that is below 2^-120 is 2^-120. The bits of a float32 are
// its logarithm, all but linear between powers of 2.
inline void RoughExponential(const Lanes& x, Lanes& out) {
    const Lanes power = x * 1.44269504f, inside = power < -120.0f ? Lanes{} - 120.0f : power;
    const IntLanes bits = __builtin_convertvector((inside + 126.957f) * 0x1p23f, IntLanes);
    out = reinterpret_cast<const Lanes&>(bits);
}

// x, 0 to 2^32 - 2^16, to the nearest integer. Each file that includes this has its own way.
inline void Round(const Lanes& x, IntLanes& out);

// scores [K] -> planes: round((score - low) / unit), byte by byte; plane p of a codebook stands p * stride further on.
LowerBytes CutPlanes(const float* scores, const float* shares, int64_t count, int64_t readable, Range range,
                     float per_unit, int64_t planes, int64_t stride, uint8_t* out) {
    Lanes both{}, sum{}, squares{}, mass{}, masses{}, mixed{}, tokens{};
    ForLanes(scores, count, readable, range.low, [&](int64_t k, const Lanes& part) {
        IntLanes whole;
        Round((part - range.low) * per_unit, whole);
        const Lanes& share = *reinterpret_cast<const Lanes*>(shares + k);
        const Lanes rest = __builtin_convertvector(whole & 0xffff, Lanes);
        both += share * rest;
        sum += rest;
        squares += rest * rest;
        Lanes softmax;
        RoughExponential(part - range.high, softmax);
        softmax *= share;
        mass += softmax;
        masses += softmax * softmax;
        mixed += softmax * share;
        tokens += share * share;
        for (int64_t p = 0; p < planes; ++p) {
            *reinterpret_cast<ByteLanes*>(out + p * stride + k) = __builtin_convertvector(whole, ByteLanes);
            whole >>= 8;
        }
    });
    const double all = Sum(mass);
    const double moved = (Sum(masses) / all - 2.0 * Sum(mixed)) / all + Sum(tokens);
    const double mean = Sum(both);
    const double variance = mean * mean + (Sum(squares) - 2.0 * mean * Sum(sum)) / static_cast<double>(count);
    return {mean, variance > 0.0 ? variance : 0.0, moved > 0.0 ? moved : 0.0};
}

bool ToFixedPoint(const float* tables, const float* shares, int64_t num_codebooks, int64_t num_codes,
                  FixedPoint* fixed) {
    Range ranges[kMaxFixedCodebooks];
    float spans[kMaxFixedCodebooks];
    double lowest = 0.0, all = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        ranges[m] = RangeOf(tables + m * num_codes, num_codes, (num_codebooks - m) * num_codes);
        spans[m] = ranges[m].high - ranges[m].low;
        if (!(spans[m] < __builtin_inff())) return false;
        lowest += ranges[m].low;
        all += spans[m];
    }
    const float covered = CoveredSpan(spans, num_codebooks);
    // Without any span all integers are 0, whatever the unit.
    const float per_unit = kLargest / (covered > 0.0f ? covered : 0x1p-40f);
    if (!(per_unit < __builtin_inff())) return false;
    fixed->num_codes = num_codes;
    fixed->num_wide = 0;
    const int64_t stride = num_codebooks * kTable;
    double rest = 0.0, variance = 0.0, common = 0.0, error = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const bool wide = spans[m] > covered;
        const LowerBytes bytes =
            CutPlanes(tables + m * num_codes, shares + m * kTable, num_codes, (num_codebooks - m) * num_codes,
                      ranges[m], per_unit, wide ? 4 : 3, stride, fixed->planes + m * kTable);
        if (wide) fixed->wide[fixed->num_wide++] = static_cast<int16_t>(m);
        rest += bytes.mean;
        variance += bytes.variance;
        common += bytes.variance * bytes.moved;
        error += bytes.mean > 32768.0 ? bytes.mean : 65536.0 - bytes.mean;
    }
    const double unit = 1.0 / static_cast<double>(per_unit), step = 65536.0 * unit;
    fixed->unit = static_cast<float>(unit);
    fixed->step = static_cast<float>(step);
    fixed->middle = static_cast<int32_t>(0.5 * all / step);
    fixed->offset = static_cast<float>(lowest + fixed->middle * step);
    fixed->rest = static_cast<float>(rest * unit);
    fixed->deviation = static_cast<float>(__builtin_sqrt(variance) * unit);
    fixed->common_deviation = static_cast<float>(__builtin_sqrt(common) * unit);
    fixed->error = static_cast<float>(error * unit);
    return true;
}

// ln(2)^n / n!, of which 2^f is the sum with f^n; for f of at most a half these leave out less than 2^-18.
constexpr float kPowerOfTwo[]{1.0f, 6.93147181e-1f, 2.40226507e-1f, 5.55041087e-2f, 9.61812911e-3f, 1.33335581e-3f};
