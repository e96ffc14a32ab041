// Plain C++ for any CPU: sixteen lanes are an array, and the compiler makes of it what it can.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "../trellis_rows.h"

namespace embpack::portable {
namespace {

struct F32x16 {
    float lane[16];
};
struct I32x16 {
    int32_t lane[16];
};
struct Mask16 {
    uint32_t bits;
};
struct F64x16 {
    double lane[16];
};

constexpr const char* isa_name = "portable";
#ifdef __FP_FAST_FMAF
constexpr bool has_fast_fma = true;
#else
constexpr bool has_fast_fma = false;   // the C library's, which may be a function of many operations
#endif
constexpr bool looks_up_in_one = true;   // sixteen multiply-adds a row, not one a value
constexpr size_t most_sums = 2;
constexpr size_t most_trellis_sums = 4;
constexpr size_t rows_early = 1;
constexpr size_t trellis_rows_early = 0, most_means_kept = 0;
constexpr size_t starts_at_once = 1;   // ranges that sums are made for in one pass
constexpr size_t vectors_of_words = 0;   // none, see avx2.cpp

template <class Fn>
inline F32x16 each_lane(Fn fn) {
    F32x16 out;
    for (size_t i = 0; i < 16; i++) out.lane[i] = fn(i);
    return out;
}
template <class Fn>
inline Mask16 each_lane_bit(Fn fn) {
    uint32_t bits = 0;
    for (size_t i = 0; i < 16; i++) bits |= static_cast<uint32_t>(fn(i)) << i;
    return {bits};
}

inline void stay_in_register(F32x16&) {}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// To float16, nearest, ties to even; beyond 65519 is infinity, NaN stays NaN.
inline uint16_t narrow_f16(float x) {
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
    uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);   // 65536 and above
    if (magnitude < 0x38800000u) {
        // Below 2^-14 a float16 is a multiple of 2^-24, the spacing of floats next to 0.5: adding 0.5 rounds.
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    magnitude += 0x0fffu + odd;                   // carries into the kept bits exactly when it should
    return static_cast<uint16_t>(sign | ((magnitude >> 13) - (112u << 10)));
}
inline float widen_f16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude < 0x400u) {
        const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
        return float_of(sign | bits_of(tiny));
    }
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

inline Mask16 first_lanes(size_t n) { return {(1u << n) - 1u}; }

inline F32x16 splat(float x) {
    return each_lane([x](size_t) { return x; });
}
inline F32x16 splat_at(const float* p) { return splat(*p); }
inline F32x16 load(const float* p) {
    return each_lane([p](size_t i) { return p[i]; });
}
inline F32x16 load_first(const float* p, size_t n) {
    return each_lane([p, n](size_t i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, F32x16 x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline void store_first(float* p, F32x16 x, size_t n) { std::memcpy(p, x.lane, n * sizeof(float)); }

inline F32x16 load_f16(const uint16_t* p) {
    return each_lane([p](size_t i) { return widen_f16(p[i]); });
}
// The two float16 at p.
inline void widen_two_f16(const uint8_t* p, float* to) {
    uint16_t two[2];
    std::memcpy(two, p, sizeof two);
    to[0] = widen_f16(two[0]);
    to[1] = widen_f16(two[1]);
}
inline void splat_two_f16(const uint8_t* p, F32x16& first, F32x16& second) {
    float two[2];
    widen_two_f16(p, two);
    first = splat(two[0]);
    second = splat(two[1]);
}
inline F32x16 load_bf16(const uint16_t* p) {
    return each_lane([p](size_t i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}
inline void store_f16(uint16_t* p, F32x16 x) {
    for (size_t i = 0; i < 16; i++) p[i] = narrow_f16(x.lane[i]);
}
inline F32x16 round_f16(F32x16 x) {
    return each_lane([&](size_t i) { return widen_f16(narrow_f16(x.lane[i])); });
}

inline F32x16 add(F32x16 a, F32x16 b) {
    return each_lane([&](size_t i) { return a.lane[i] + b.lane[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return each_lane([&](size_t i) { return a.lane[i] - b.lane[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return each_lane([&](size_t i) { return a.lane[i] * b.lane[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return each_lane([&](size_t i) { return a.lane[i] / b.lane[i]; });
}
// A true fused multiply-add: the C library uses the CPU's instruction where there is one.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return each_lane([&](size_t i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
inline F32x16 sqrt(F32x16 a) {
    return each_lane([&](size_t i) { return __builtin_sqrtf(a.lane[i]); });
}
inline F32x16 magnitude(F32x16 a) {
    return each_lane([&](size_t i) { return __builtin_fabsf(a.lane[i]); });
}
// Second operand on ties and NaN, as the x86 instructions do.
inline F32x16 min(F32x16 a, F32x16 b) {
    return each_lane([&](size_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32x16 max(F32x16 a, F32x16 b) {
    return each_lane([&](size_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

// In each lane what the lane that many away has: i ^ distance.
template <size_t distance>
inline F32x16 exchange(F32x16 x) {
    return each_lane([&](size_t i) { return x.lane[i ^ distance]; });
}

inline Mask16 less(F32x16 a, F32x16 b) {
    return each_lane_bit([&](size_t i) { return a.lane[i] < b.lane[i]; });
}
inline Mask16 equal(F32x16 a, F32x16 b) {
    return each_lane_bit([&](size_t i) { return a.lane[i] == b.lane[i]; });
}
inline Mask16 both(Mask16 a, Mask16 b) { return {a.bits & b.bits}; }
inline Mask16 either(Mask16 a, Mask16 b) { return {a.bits | b.bits}; }
inline Mask16 except(Mask16 a, Mask16 b) { return {a.bits & ~b.bits}; }
inline uint32_t lane_bits(Mask16 m) { return m.bits; }
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
    return each_lane([&](size_t i) { return (m.bits >> i) & 1u ? yes.lane[i] : no.lane[i]; });
}
inline Mask16 finite(F32x16 x) {
    return each_lane_bit([&](size_t i) { return (bits_of(x.lane[i]) & 0x7fffffffu) < 0x7f800000u; });
}

// Clips to [0, top], then rounds to the nearest integer, ties to even. Clips by the floats' bits, as the other
// instruction sets do, so that NaN ends up the same; rounds by adding and taking away 1.5 * 2^23, which below
// 2^22 leaves no room for a fraction.
inline F32x16 round_code(F32x16 x, F32x16 top) {
    return each_lane([&](size_t i) {
        const int32_t bits = static_cast<int32_t>(bits_of(x.lane[i]));
        const int32_t top_bits = static_cast<int32_t>(bits_of(top.lane[i]));
        const int32_t low = bits > 0 ? bits : 0;
        const float clipped = float_of(static_cast<uint32_t>(low < top_bits ? low : top_bits));
        return (clipped + 12582912.0f) - 12582912.0f;
    });
}
// Right below 2^22 only, where every code is.
inline F32x16 round_nearest(F32x16 x) {
    return each_lane([&](size_t i) { return (x.lane[i] + 12582912.0f) - 12582912.0f; });
}
inline F32x16 from_nearest(F32x16 x) { return sub(x, round_nearest(x)); }
inline I32x16 to_int(F32x16 x) {
    I32x16 out;
    for (size_t i = 0; i < 16; i++) out.lane[i] = static_cast<int32_t>(x.lane[i]);
    return out;
}
inline F32x16 to_float(I32x16 x) {
    return each_lane([&](size_t i) { return static_cast<float>(x.lane[i]); });
}

// Sixteen codes as 2 * bits bytes, the first code in the lowest bits.
template <int bits>
inline void store_codes(uint8_t* p, I32x16 codes) {
    constexpr int per_byte = 8 / bits;
    for (int byte = 0; byte < 2 * bits; byte++) {
        int32_t value = 0;
        for (int k = 0; k < per_byte; k++) value |= codes.lane[byte * per_byte + k] << (k * bits);
        p[byte] = static_cast<uint8_t>(value);
    }
}
// Sixteen codes of 2 * bits bytes, one in each lane.
template <int bits>
struct Spread {
    I32x16 operator()(const uint8_t* p) const {
        constexpr int per_byte = 8 / bits;
        I32x16 out;
        for (int i = 0; i < 16; i++) out.lane[i] = (p[i / per_byte] >> (i % per_byte * bits)) & ((1 << bits) - 1);
        return out;
    }
};
template <int bits>
inline F32x16 in_column_order(F32x16 x) {
    return x;
}
template <int bits>
inline I32x16 only_code(I32x16 codes) {
    return codes;
}

// The float of each code in a table of sixteen.
inline F32x16 look_up(F32x16 table, I32x16 codes) {
    return each_lane([&](size_t i) { return table.lane[codes.lane[i] & 15]; });
}

// The same with tables of 2^bits floats.
template <int bits>
inline F32x16 look_up_in(const float* table, I32x16 indices) {
    return each_lane([&](size_t i) { return table[indices.lane[i] & ((1 << bits) - 1)]; });
}
inline I32x16 splat_int(int32_t x) {
    I32x16 out;
    for (size_t i = 0; i < 16; i++) out.lane[i] = x;
    return out;
}
inline I32x16 load_int(const int32_t* p) {
    I32x16 out;
    std::memcpy(out.lane, p, sizeof out.lane);
    return out;
}
inline Mask16 has_bit(I32x16 x, size_t bit) {
    return each_lane_bit([&](size_t i) { return (x.lane[i] >> bit & 1) != 0; });
}
inline I32x16 add_int(I32x16 a, I32x16 b) {
    for (size_t i = 0; i < 16; i++) a.lane[i] += b.lane[i];
    return a;
}
inline I32x16 select_int(Mask16 m, I32x16 yes, I32x16 no) {
    for (size_t i = 0; i < 16; i++) no.lane[i] = (m.bits >> i) & 1u ? yes.lane[i] : no.lane[i];
    return no;
}

template <class Fn>
inline F64x16 each_wide_lane(Fn fn) {
    F64x16 out;
    for (size_t i = 0; i < 16; i++) out.lane[i] = fn(i);
    return out;
}
inline F64x16 splat_f64(double x) {
    return each_wide_lane([x](size_t) { return x; });
}
inline F64x16 load_f64(const double* p) {
    return each_wide_lane([p](size_t i) { return p[i]; });
}
inline F64x16 widen_f32(F32x16 x) {
    return each_wide_lane([&](size_t i) { return static_cast<double>(x.lane[i]); });
}
inline F64x16 add(const F64x16& a, const F64x16& b) {
    return each_wide_lane([&](size_t i) { return a.lane[i] + b.lane[i]; });
}
inline F64x16 sub(const F64x16& a, const F64x16& b) {
    return each_wide_lane([&](size_t i) { return a.lane[i] - b.lane[i]; });
}
inline F64x16 mul(const F64x16& a, const F64x16& b) {
    return each_wide_lane([&](size_t i) { return a.lane[i] * b.lane[i]; });
}
inline Mask16 less(const F64x16& a, const F64x16& b) {
    return each_lane_bit([&](size_t i) { return a.lane[i] < b.lane[i]; });
}
inline F64x16 select(Mask16 m, const F64x16& yes, const F64x16& no) {
    return each_wide_lane([&](size_t i) { return (m.bits >> i) & 1u ? yes.lane[i] : no.lane[i]; });
}
inline F64x16 zero_f64() { return {}; }
// The square of a float is exact in double, so this rounds once, as a fused multiply-add does.
inline F64x16 add_square(F64x16 sum, F32x16 x) {
    for (size_t i = 0; i < 16; i++) {
        const double wide = x.lane[i];
        sum.lane[i] += wide * wide;
    }
    return sum;
}
inline F64x16 add_f32(F64x16 sum, F32x16 x) {
    for (size_t i = 0; i < 16; i++) sum.lane[i] += x.lane[i];
    return sum;
}
inline void store_f64(double* p, F64x16 x) { std::memcpy(p, x.lane, sizeof x.lane); }

// out[j * lanes + i] = rows[i * stride + j] for 16 rows and 16 columns.
inline void transpose_16x16(const float* rows, size_t stride, float* out) {
    for (size_t i = 0; i < 16; i++)
        for (size_t j = 0; j < 16; j++) out[j * lanes + i] = rows[i * stride + j];
}

// Positions of a block's bits, what is packed in ascending order.
struct BitPositions {
    uint8_t position[64];
    uint8_t is_inside[64];
    size_t count;

    BitPositions() = default;
    explicit BitPositions(uint64_t positions) : count(0) {
        for (size_t p = 0; p < 64; p++) {
            is_inside[p] = static_cast<uint8_t>(positions >> p & 1);
            if (is_inside[p]) position[count++] = static_cast<uint8_t>(p);
        }
    }
};

constexpr size_t least_slots = 4;

// For each position of a block the number of its level.
template <size_t slots>
struct TrellisNumbers {
    uint8_t byte[64] = {};

    TrellisNumbers() = default;
    explicit TrellisNumbers(const BitPositions&) {}

    // Adds `weight` where bits are set.
    template <bool is_full>
    void add(const BitPositions& present, uint64_t bits, size_t weight) {
        if constexpr (!is_full) {
            for (size_t i = 0; i < present.count; i++)
                byte[present.position[i]] = static_cast<uint8_t>(byte[present.position[i]] + (bits >> i & 1) * weight);
            return;
        }
        for (size_t p = 0; p < 64; p += 8) {   // Eight bits, one in each byte of a word.
            const uint64_t copies = (bits >> p & 0xff) * 0x0101010101010101;
            const uint64_t own = copies & 0x8040201008040201, ones = (own + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
            uint64_t eight;
            std::memcpy(&eight, byte + p, sizeof eight);
            eight += ones * weight;
            std::memcpy(byte + p, &eight, sizeof eight);
        }
    }
};

// The levels of trellis-coded columns.
struct WrittenLevels {
    static constexpr size_t most_planes = 6;
    const AllTrellisLevels& levels;
    size_t num_narrow;

    explicit WrittenLevels(const AllTrellisLevels& levels) : levels(levels), num_narrow(levels.num_narrow) {}

    static size_t weight(size_t k) { return size_t{1} << k; }

    template <bool is_full, class Numbers, class Columns, class Read>
    void finish(Numbers& numbers, const Columns& of, const uint8_t* row, const Read&) const {
        if (of.wide_vectors > 0) numbers.template add<false>(of.is_wide, of.top_bits(row), num_narrow);
    }
    template <class Numbers, class Columns>
    F32x16 operator()(const Numbers& numbers, const Columns& of, size_t v) const {
        return each_lane([&](size_t i) {
            const size_t p = trellis_vectors * i + v;
            return levels.values[numbers.byte[p] + (of.is_wide.is_inside[p] ? num_narrow : 0)];
        });
    }
};

using FewLevels = WrittenLevels;

using SomeLevels = WrittenLevels;

// What looks the levels up of narrow codes of so many bits, and of wide ones.
template <bool, class Use>
inline void with_trellis_levels(const TrellisShape&, WideVectors, Use use) {
    use.template operator()<WrittenLevels>();
}

#include "../kernels/all-inl.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = make_kernels();

}  // namespace embpack::portable
