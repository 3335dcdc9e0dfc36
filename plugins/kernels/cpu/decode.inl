// What decoding asks of an instruction set: sums, maxima, exponentials, selection. Included like generic.inl; vectors
// of sixteen are lowered to what there is.

using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using IntLanes = int32_t __attribute__((vector_size(64), aligned(4), may_alias));

constexpr int64_t kLanes = 16;
constexpr float kInfinity = __builtin_inff();

void Add(const float* a, const float* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

void Raise(const float* x, int64_t count, float* most) {
    for (int64_t i = 0; i < count; ++i) most[i] = x[i] > most[i] ? x[i] : most[i];
}

float Largest(const float* x, int64_t count) {
    Lanes most = Lanes{} - kInfinity, more = most;
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        const Lanes &first = *reinterpret_cast<const Lanes*>(x + i),
                    &second = *reinterpret_cast<const Lanes*>(x + i + kLanes);
        most = first > most ? first : most;
        more = second > more ? second : more;
    }
    most = more > most ? more : most;
    float largest = -kInfinity;
    for (int64_t lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    for (; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// x, at most 0, becomes exp(x), off by less than 2^-22 of it; 0 below the smallest normal number; NaN stays.
//
// exp(x) = 2^n exp(r) with |r| at most ln(2)/2, where eight terms of the series leave out less than 2^-27. In units of
// 2^-24 the roundings add up to: the last sum 1, the two products and the sum before it 1.2, those before them 0.5, r
// 0.4. (By reference: a vector wider than the registers has no settled way to be passed.)
inline void Exponential(Lanes& x) {
    constexpr float kLeast = -87.3365f;  // 2^-126
    const Lanes inside = x < kLeast ? Lanes{} + kLeast : x;
    // Adding 1.5 * 2^23 rounds to a whole number, which is then in the last bits.
    const Lanes whole = inside * 1.44269504f + 0x1.8p23f, n = whole - 0x1.8p23f;
    // ln(2) in two parts: n times the first, of nine bits, is exact.
    const Lanes r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
    Lanes sum = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    sum = sum * r + 1.0f / 120.0f;
    sum = sum * r + 1.0f / 24.0f;
    sum = sum * r + 1.0f / 6.0f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const IntLanes power = (reinterpret_cast<const IntLanes&>(whole) - (0x4b400000 - 127)) << 23;
    x = x < kLeast ? Lanes{} : sum * reinterpret_cast<const Lanes&>(power);
}

float Exponentials(float* x, int64_t count, float peak, float scale) {
    Lanes total{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Lanes part = (*reinterpret_cast<const Lanes*>(x + i) - peak) * scale;
        Exponential(part);
        total += part;
        *reinterpret_cast<Lanes*>(x + i) = part;
    }
    if (i < count) {
        Lanes part = Lanes{} - kInfinity;
        for (int64_t lane = 0; i + lane < count; ++lane) part[lane] = (x[i + lane] - peak) * scale;
        Exponential(part);
        total += part;
        for (int64_t lane = 0; i + lane < count; ++lane) x[i + lane] = part[lane];
    }
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += total[lane];
    return sum;
}

inline bool Any(const IntLanes& lanes) {
    uint64_t pairs[kLanes / 2];
    __builtin_memcpy(pairs, &lanes, sizeof pairs);
    return ((pairs[0] | pairs[1]) | (pairs[2] | pairs[3]) | (pairs[4] | pairs[5]) | (pairs[6] | pairs[7])) != 0;
}

// Most groups of numbers hold none.
int64_t Select(const float* x, int64_t count, float least, int32_t* picks) {
    constexpr int64_t kGroup = 4 * kLanes;
    int64_t found = 0, i = 0;
    const auto one_by_one = [&](int64_t end) {
        for (; i < end; ++i) {
            picks[found] = static_cast<int32_t>(i);
            found += x[i] >= least;
        }
    };
    while (i + kGroup <= count) {
        const auto* part = reinterpret_cast<const Lanes*>(x + i);
        const IntLanes some[]{part[0] >= least, part[1] >= least, part[2] >= least, part[3] >= least};
        if (!Any((some[0] | some[1]) | (some[2] | some[3]))) {
            i += kGroup;
            continue;
        }
        for (const IntLanes& lanes : some) {
            if (Any(lanes)) {
                one_by_one(i + kLanes);
            } else {
                i += kLanes;
            }
        }
    }
    one_by_one(count);
    return found;
}

constexpr Decode kDecode{Add, Raise, Largest, Exponentials, Select};
