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
constexpr int64_t kTable = 256;                   // entries of a plane's table
constexpr float kLargest = 16777215.0f - 255.0f;  // of three planes; a little less than 2^24 leaves room for rounding
constexpr int64_t kWideShare = 6;                 // at most M / kWideShare codebooks have the fourth plane
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
        if (above > count / kWideShare) break;
        covered = next;
    }
    return covered;
}

// What the lower bytes of a codebook's integers are, summed over its K codes.
struct LowerBytes {
    double both, upper, squares;  // of two bytes, of the upper one in units of 256, of two bytes squared
};

// x, 0 to 2^32 - 2^16, to the nearest integer. Each file that includes this has its own way.
inline void Round(const Lanes& x, IntLanes& out);

// scores [K] -> planes: round((score - low) / unit), byte by byte; plane p of a codebook stands p * stride further on.
LowerBytes CutPlanes(const float* scores, int64_t count, int64_t readable, float low, float per_unit, int64_t planes,
                     int64_t stride, uint8_t* out) {
    Lanes both{}, upper{}, squares{};
    // Behind the last code stand zeros, which add nothing.
    ForLanes(scores, count, readable, low, [&](int64_t k, const Lanes& part) {
        IntLanes whole;
        Round((part - low) * per_unit, whole);
        const Lanes rest = __builtin_convertvector(whole & 0xffff, Lanes);
        both += rest;
        squares += rest * rest;
        upper += __builtin_convertvector((whole >> 8) & 0xff, Lanes);
        for (int64_t p = 0; p < planes; ++p) {
            *reinterpret_cast<ByteLanes*>(out + p * stride + k) = __builtin_convertvector(whole, ByteLanes);
            whole >>= 8;
        }
    });
    return {Sum(both), Sum(upper), Sum(squares)};
}

bool ToFixedPoint(const float* tables, int64_t num_codebooks, int64_t num_codes, FixedPoint* fixed) {
    float lows[kMaxFixedCodebooks], spans[kMaxFixedCodebooks];
    double lowest = 0.0, all = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const Range range = RangeOf(tables + m * num_codes, num_codes, (num_codebooks - m) * num_codes);
        lows[m] = range.low;
        spans[m] = range.high - range.low;
        if (!(spans[m] < __builtin_inff())) return false;
        lowest += range.low;
        all += spans[m];
    }
    const float covered = CoveredSpan(spans, num_codebooks);
    // Without any span all integers are 0, whatever the unit.
    const float per_unit = kLargest / (covered > 0.0f ? covered : 0x1p-40f);
    if (!(per_unit < __builtin_inff())) return false;
    fixed->num_codes = num_codes;
    fixed->num_wide = 0;
    const int64_t stride = num_codebooks * kTable;
    double rest = 0.0, upper = 0.0, variance = 0.0, error = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const bool wide = spans[m] > covered;
        const LowerBytes bytes = CutPlanes(tables + m * num_codes, num_codes, (num_codebooks - m) * num_codes, lows[m],
                                           per_unit, wide ? 4 : 3, stride, fixed->planes + m * kTable);
        if (wide) fixed->wide[fixed->num_wide++] = static_cast<int16_t>(m);
        const double mean = bytes.both / static_cast<double>(num_codes);
        rest += mean;
        upper += 256.0 * bytes.upper / static_cast<double>(num_codes);
        variance += bytes.squares / static_cast<double>(num_codes) - mean * mean;
        error += mean > 32768.0 ? mean : 65536.0 - mean;
    }
    const double unit = 1.0 / static_cast<double>(per_unit), step = 65536.0 * unit;
    fixed->unit = static_cast<float>(unit);
    fixed->step = static_cast<float>(step);
    fixed->middle = static_cast<int32_t>(0.5 * all / step);
    fixed->offset = static_cast<float>(lowest + fixed->middle * step);
    fixed->rest = static_cast<float>(rest * unit);
    fixed->upper_rest = static_cast<float>(upper * unit);
    fixed->deviation = static_cast<float>(__builtin_sqrt(variance > 0.0 ? variance : 0.0) * unit);
    fixed->error = static_cast<float>(error * unit);
    return true;
}

// ln(2)^n / n!, of which 2^f is the sum with f^n; for f of at most a half these leave out less than 2^-18.
constexpr float kPowerOfTwo[]{1.0f, 6.93147181e-1f, 2.40226507e-1f, 5.55041087e-2f, 9.61812911e-3f, 1.33335581e-3f};
