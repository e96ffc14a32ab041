// Plain C++ for any CPU, with the vectors of four lanes that GCC and Clang have everywhere: sixteen lanes are four of
// them.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"

namespace embpack::EMBPACK_ISA {
namespace {

// Four lanes are what the smallest vectors have, of SSE2 and of NEON.
using Four = float __attribute__((vector_size(16)));
using FourInts = int32_t __attribute__((vector_size(16)));
using Two = double __attribute__((vector_size(16)));
using TwoLongs = int64_t __attribute__((vector_size(16)));

struct F32x16 {
    Four part[4];
};
struct I32x16 {
    FourInts part[4];
};
using Mask16 = I32x16;   // all bits of a lane set, or none
struct F64x16 {
    Two part[8];
};

#ifdef __FP_FAST_FMAF
constexpr bool has_fast_fma = true;
#else
constexpr bool has_fast_fma = false;   // the C library's, which may be a function of many operations
#endif
constexpr bool looks_up_in_one = true;   // sixteen multiply-adds a row, not one a value
constexpr bool looks_halves_up = false;
constexpr size_t most_sums = 2;
constexpr size_t product_sums = 2;
constexpr size_t rows_early = 1;
constexpr size_t starts_at_once = 1;   // ranges that `optimal` goes on with together
constexpr size_t sums_at_once = 1;   // ranges that it makes sums for in one pass
constexpr bool picks_of_rows = false;
constexpr size_t vectors_of_codes = 1;
constexpr size_t vectors_of_words = 0;   // none, see avx2.cpp
using ExactTiles = void;   // sums are added level by level

// Vectors of what fn(i) gives for each of their parts, or lanes.
template <class Vector = F32x16, class Fn>
[[gnu::always_inline]] inline Vector each_part(const Fn& fn) {
    if constexpr (sizeof(Vector::part) / sizeof(Vector::part[0]) == 4)
        return {{fn(0), fn(1), fn(2), fn(3)}};
    else
        return {{fn(0), fn(1), fn(2), fn(3), fn(4), fn(5), fn(6), fn(7)}};
}
template <class Fn>
[[gnu::always_inline]] inline F32x16 each_lane(const Fn& fn) {
    return each_part([&](size_t k) { return Four{fn(4 * k), fn(4 * k + 1), fn(4 * k + 2), fn(4 * k + 3)}; });
}
inline Four floats_of(FourInts x) { return reinterpret_cast<Four>(x); }
inline FourInts bits_of_four(Four x) { return reinterpret_cast<FourInts>(x); }
inline Four select_four(FourInts mask, Four yes, Four no) {
    return floats_of((bits_of_four(yes) & mask) | (bits_of_four(no) & ~mask));
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

inline Mask16 first_lanes(size_t n) {
    return each_part<Mask16>([n](size_t k) {
        const int first = static_cast<int>(4 * k);
        return FourInts{first, first + 1, first + 2, first + 3} < static_cast<int>(n);
    });
}

inline F32x16 splat(float x) {
    return each_part([x](size_t) { return Four{x, x, x, x}; });
}
inline F32x16 splat_at(const float* p) { return splat(*p); }
inline F32x16 load(const float* p) {
    F32x16 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, F32x16 x) { std::memcpy(p, &x, sizeof x); }
#include "whole_part-inl.h"

inline F32x16 load_first(const float* p, size_t n) {
    if (n >= 16) return load(p);
    float lane[16] = {};
    std::memcpy(lane, p, n * sizeof(float));
    return load(lane);
}
inline void store_first(float* p, F32x16 x, size_t n) { std::memcpy(p, &x, n * sizeof(float)); }

inline F32x16 load_f16(const uint16_t* p) {
    float lane[16];
    for (size_t i = 0; i < 16; i++) lane[i] = widen_f16(p[i]);
    return load(lane);
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
    float lane[16];
    store(lane, x);
    for (size_t i = 0; i < 16; i++) p[i] = narrow_f16(lane[i]);
}
constexpr bool notes_overflow = false;
inline void forget_overflow() {}
inline bool has_noted_overflow() { return false; }
inline F32x16 round_f16(F32x16 x) {
    float lane[16];
    store(lane, x);
    for (float& value : lane) value = widen_f16(narrow_f16(value));
    return load(lane);
}

inline F32x16 add(F32x16 a, F32x16 b) {
    return each_part([&](size_t k) { return a.part[k] + b.part[k]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return each_part([&](size_t k) { return a.part[k] - b.part[k]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return each_part([&](size_t k) { return a.part[k] * b.part[k]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return each_part([&](size_t k) { return a.part[k] / b.part[k]; });
}
// A true fused multiply-add: the C library uses the CPU's instruction where there is one.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    float x[16], y[16], z[16];
    store(x, a);
    store(y, b);
    store(z, c);
    for (size_t i = 0; i < 16; i++) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return load(z);
}
inline F32x16 sqrt(F32x16 a) {
    return each_lane([&](size_t i) { return __builtin_sqrtf(a.part[i / 4][i % 4]); });
}
inline F32x16 magnitude(F32x16 a) {
    return each_part([&](size_t k) { return floats_of(bits_of_four(a.part[k]) & 0x7fffffff); });
}
// Second operand on ties and NaN, as the x86 instructions do.
inline F32x16 min(F32x16 a, F32x16 b) {
    return each_part([&](size_t k) { return select_four(a.part[k] < b.part[k], a.part[k], b.part[k]); });
}
inline F32x16 max(F32x16 a, F32x16 b) {
    return each_part([&](size_t k) { return select_four(a.part[k] > b.part[k], a.part[k], b.part[k]); });
}

// In each lane what the lane that many away has: i ^ distance.
template <size_t distance>
inline F32x16 exchange(F32x16 x) {
    if constexpr (distance >= 4) return each_part([&](size_t k) { return x.part[k ^ distance / 4]; });
    return each_part([&](size_t k) {
        const Four y = x.part[k];
        return distance == 1 ? Four{y[1], y[0], y[3], y[2]} : Four{y[2], y[3], y[0], y[1]};
    });
}

inline Mask16 less(F32x16 a, F32x16 b) {
    return each_part<Mask16>([&](size_t k) { return a.part[k] < b.part[k]; });
}
inline Mask16 equal(F32x16 a, F32x16 b) {
    return each_part<Mask16>([&](size_t k) { return a.part[k] == b.part[k]; });
}
inline Mask16 both(Mask16 a, Mask16 b) {
    return each_part<Mask16>([&](size_t k) { return a.part[k] & b.part[k]; });
}
inline Mask16 either(Mask16 a, Mask16 b) {
    return each_part<Mask16>([&](size_t k) { return a.part[k] | b.part[k]; });
}
inline Mask16 except(Mask16 a, Mask16 b) {
    return each_part<Mask16>([&](size_t k) { return a.part[k] & ~b.part[k]; });
}
inline uint32_t lane_bits(Mask16 m) {
    int32_t lane[16];
    std::memcpy(lane, &m, sizeof lane);
    uint32_t bits = 0;
    for (size_t i = 0; i < 16; i++) bits |= static_cast<uint32_t>(lane[i] & 1) << i;
    return bits;
}
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
    return each_part([&](size_t k) { return select_four(m.part[k], yes.part[k], no.part[k]); });
}
inline Mask16 finite(F32x16 x) {
    return each_part<Mask16>([&](size_t k) { return (bits_of_four(x.part[k]) & 0x7fffffff) < 0x7f800000; });
}

// Clips to [0, top], then rounds to the nearest integer, ties to even. Clips by the floats' bits, as the other
// instruction sets do, so that NaN ends up the same; rounds by adding and taking away 1.5 * 2^23, which below
// 2^22 leaves no room for a fraction.
inline F32x16 round_code(F32x16 x, F32x16 top) {
    return each_part([&](size_t k) {
        const FourInts bits = bits_of_four(x.part[k]), top_bits = bits_of_four(top.part[k]);
        const FourInts low = bits & (bits > 0), is_below = low < top_bits;
        const Four clipped = floats_of((low & is_below) | (top_bits & ~is_below));
        return (clipped + 12582912.0f) - 12582912.0f;
    });
}
// Right below 2^22 only, where every code is.
inline F32x16 round_nearest(F32x16 x) {
    return each_part([&](size_t k) { return (x.part[k] + 12582912.0f) - 12582912.0f; });
}
inline F32x16 from_nearest(F32x16 x) { return sub(x, round_nearest(x)); }
inline I32x16 to_int(F32x16 x) {
    return each_part<I32x16>([&](size_t k) { return __builtin_convertvector(x.part[k], FourInts); });
}
inline F32x16 to_float(I32x16 x) {
    return each_part([&](size_t k) { return __builtin_convertvector(x.part[k], Four); });
}

inline I32x16 load_int(const int32_t* p) {
    I32x16 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Sixteen codes as 2 * bits bytes, the first code in the lowest bits.
template <int bits>
inline void store_codes(uint8_t* p, I32x16 codes) {
    constexpr int per_byte = 8 / bits;
    int32_t code[16];
    std::memcpy(code, &codes, sizeof code);
    for (int byte = 0; byte < 2 * bits; byte++) {
        int32_t value = 0;
        for (int k = 0; k < per_byte; k++) value |= code[byte * per_byte + k] << (k * bits);
        p[byte] = static_cast<uint8_t>(value);
    }
}
// Sixteen codes of 2 * bits bytes, one in each lane.
struct SpreadCodes {
    int32_t lane[16];
};
template <int bits>
struct Spread {
    [[gnu::always_inline]] SpreadCodes operator()(const uint8_t* p) const {
        constexpr size_t per_byte = 8 / bits;
        SpreadCodes codes;
        for (size_t i = 0; i < 16; i++) codes.lane[i] = (p[i / per_byte] >> (i % per_byte * bits)) & ((1 << bits) - 1);
        return codes;
    }
};
template <int bits>
inline F32x16 in_column_order(F32x16 x) {
    return x;
}
template <int bits>
inline I32x16 only_code(const SpreadCodes& codes) {
    return load_int(codes.lane);
}

// The float of each code in a table of sixteen.
[[gnu::always_inline]] inline F32x16 look_up(const F32x16& table, const SpreadCodes& codes) {
    const float* const lane = reinterpret_cast<const float*>(&table);
    return each_lane([&](size_t i) { return lane[codes.lane[i] & 15]; });
}
inline F32x16 look_up(const F32x16& table, I32x16 codes) {
    SpreadCodes spread;
    std::memcpy(&spread, &codes, sizeof spread);
    return look_up(table, spread);
}

// The same with tables of 2^bits floats.
template <int bits>
inline F32x16 look_up_in(const float* table, I32x16 indices) {
    return each_lane([&](size_t i) { return table[indices.part[i / 4][i % 4] & ((1 << bits) - 1)]; });
}
inline I32x16 splat_int(int32_t x) {
    return each_part<I32x16>([x](size_t) { return FourInts{x, x, x, x}; });
}
inline I32x16 load_words(const uint8_t* p) {
    I32x16 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline I32x16 and_int(I32x16 a, I32x16 b) {
    return each_part<I32x16>([&](size_t k) { return a.part[k] & b.part[k]; });
}
inline I32x16 shift_right(I32x16 x, int count) {
    using FourWords = uint32_t __attribute__((vector_size(16)));
    return each_part<I32x16>([&](size_t k) {
        return reinterpret_cast<FourInts>(reinterpret_cast<FourWords>(x.part[k]) >> static_cast<uint32_t>(count));
    });
}
inline Mask16 has_bit(I32x16 x, size_t bit) {
    return each_part<Mask16>([&](size_t k) { return (x.part[k] & (1 << bit)) != 0; });
}
inline I32x16 add_int(I32x16 a, I32x16 b) {
    return each_part<I32x16>([&](size_t k) { return a.part[k] + b.part[k]; });
}
inline I32x16 select_int(Mask16 m, I32x16 yes, I32x16 no) {
    return each_part<I32x16>([&](size_t k) { return (yes.part[k] & m.part[k]) | (no.part[k] & ~m.part[k]); });
}

inline F64x16 splat_f64(double x) {
    return each_part<F64x16>([x](size_t) { return Two{x, x}; });
}
inline F64x16 load_f64(const double* p) {
    F64x16 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Two widen_two(const F32x16& x, size_t k) {
    const Four four = x.part[k / 2];
    return k % 2 == 0 ? Two{four[0], four[1]} : Two{four[2], four[3]};
}
inline F64x16 widen_f32(F32x16 x) {
    return each_part<F64x16>([&](size_t k) { return widen_two(x, k); });
}
inline F64x16 add(const F64x16& a, const F64x16& b) {
    return each_part<F64x16>([&](size_t k) { return a.part[k] + b.part[k]; });
}
inline F64x16 sub(const F64x16& a, const F64x16& b) {
    return each_part<F64x16>([&](size_t k) { return a.part[k] - b.part[k]; });
}
inline F64x16 mul(const F64x16& a, const F64x16& b) {
    return each_part<F64x16>([&](size_t k) { return a.part[k] * b.part[k]; });
}
inline Mask16 less(const F64x16& a, const F64x16& b) {
    return each_part<Mask16>([&](size_t k) {
        const TwoLongs first = a.part[2 * k] < b.part[2 * k], second = a.part[2 * k + 1] < b.part[2 * k + 1];
        return FourInts{static_cast<int32_t>(first[0]), static_cast<int32_t>(first[1]), static_cast<int32_t>(second[0]),
                        static_cast<int32_t>(second[1])};
    });
}
inline F64x16 select(Mask16 m, const F64x16& yes, const F64x16& no) {
    return each_part<F64x16>([&](size_t k) {
        const FourInts four = m.part[k / 2];
        const TwoLongs mask = k % 2 == 0 ? TwoLongs{four[0], four[1]} : TwoLongs{four[2], four[3]};
        return reinterpret_cast<Two>((reinterpret_cast<TwoLongs>(yes.part[k]) & mask) |
                                     (reinterpret_cast<TwoLongs>(no.part[k]) & ~mask));
    });
}
inline F64x16 zero_f64() { return splat_f64(0.0); }
// The square of a float is exact in double, so this rounds once, as a fused multiply-add does.
inline F64x16 add_square(F64x16 sum, F32x16 x) {
    const F64x16 wide = widen_f32(x);
    return add(sum, mul(wide, wide));
}
inline F64x16 add_f32(F64x16 sum, F32x16 x) { return add(sum, widen_f32(x)); }
inline void store_f64(double* p, const F64x16& x) { std::memcpy(p, &x, sizeof x); }

// out[j * lanes + i] = rows[i * stride + j] for 16 rows and 16 columns.
inline void transpose_16x16(const float* rows, size_t stride, float* out) {
    for (size_t i = 0; i < 16; i++)
        for (size_t j = 0; j < 16; j++) out[j * lanes + i] = rows[i * stride + j];
}

}  // namespace
}  // namespace embpack::EMBPACK_ISA
