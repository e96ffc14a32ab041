// AVX2, FMA and F16C (Haswell and later, Zen and later): sixteen lanes are two registers.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../exact_units.h"
#include "../kernels.h"
#include "x86_overflow-inl.h"

namespace embpack::EMBPACK_ISA {
namespace {

struct F32x16 {
    __m256 low, high;
};
struct I32x16 {
    __m256i low, high;
};
using Mask16 = F32x16;   // all bits of a lane set, or none
struct F64x16 {
    __m256d quarter[4];
};

constexpr bool has_fast_fma = true;
constexpr bool looks_up_in_one = false;   // two permutations, a shift and a blend
constexpr bool looks_halves_up = true;
constexpr size_t most_sums = 4;   // vectors of sums that stay in registers
constexpr size_t product_sums = 4;   // those of products: as many as hide how long a multiply-add takes
constexpr size_t rows_early = 3;    // rows whose levels are read before they are added
constexpr size_t starts_at_once = 4;   // ranges that `optimal` goes on with together
constexpr size_t sums_at_once = 1;   // ranges that it makes sums for in one pass
constexpr bool picks_of_rows = true;
constexpr size_t vectors_of_codes = 2;   // whose codes are stored together
constexpr size_t vectors_of_words = 4;   // that levels_of_words makes together

inline void stay_in_register(F32x16&) {}   // there are not enough of them

inline __m256i first_lanes_of_eight(size_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline Mask16 first_lanes(size_t n) {
    return {_mm256_castsi256_ps(first_lanes_of_eight(n)),
            _mm256_castsi256_ps(first_lanes_of_eight(n < 8 ? 0 : n - 8))};
}

inline F32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
// The float at p. A load does it, but GCC would rather work with one float first, and spread what comes out.
inline F32x16 splat_at(const float* p) {
    __m256 x = _mm256_broadcast_ss(p);
    asm("" : "+x"(x));
    return {x, x};
}
// A register of a vector: loops that would not have enough of them for whole vectors take one part after the other.
using Part = __m256;
constexpr size_t parts = 2;
inline Part& part_of(F32x16& x, size_t i) { return i == 0 ? x.low : x.high; }
inline Part part_of(const F32x16& x, size_t i) { return i == 0 ? x.low : x.high; }
inline Part load_part(const float* p) { return _mm256_loadu_ps(p); }
inline Part splat_part(float x) { return _mm256_set1_ps(x); }

inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load_first(const float* p, size_t n) {
    const __m256 low = _mm256_maskload_ps(p, first_lanes_of_eight(n));
    if (n <= 8) return {low, _mm256_setzero_ps()};
    return {low, _mm256_maskload_ps(p + 8, first_lanes_of_eight(n - 8))};
}
inline void store(float* p, F32x16 x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
inline void store_first(float* p, F32x16 x, size_t n) {
    _mm256_maskstore_ps(p, first_lanes_of_eight(n), x.low);
    if (n > 8) _mm256_maskstore_ps(p + 8, first_lanes_of_eight(n - 8), x.high);
}

inline __m128i load_eight_u16(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline F32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_eight_u16(p)), _mm256_cvtph_ps(load_eight_u16(p + 8))};
}
// The two float16 at p; `to` has room for four.
inline void widen_two_f16(const uint8_t* p, float* to) {
    int32_t two;
    std::memcpy(&two, p, 4);
    _mm_storeu_ps(to, _mm_cvtph_ps(_mm_cvtsi32_si128(two)));
}
inline F32x16 load_bf16(const uint16_t* p) {
    const auto widen = [](__m128i bits) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    };
    return {widen(load_eight_u16(p)), widen(load_eight_u16(p + 8))};
}
inline void store_f16(uint16_t* p, F32x16 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
inline F32x16 round_f16(F32x16 x) {
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT)),
            _mm256_cvtph_ps(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT))};
}

inline Part add(Part a, Part b) { return _mm256_add_ps(a, b); }
inline Part sub(Part a, Part b) { return _mm256_sub_ps(a, b); }
inline Part mul(Part a, Part b) { return _mm256_mul_ps(a, b); }
inline Part fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline F32x16 magnitude(F32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Part min(Part a, Part b) { return _mm256_min_ps(a, b); }
inline Part max(Part a, Part b) { return _mm256_max_ps(a, b); }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }

// In each lane what the lane that many away has: i ^ distance.
template <size_t distance>
inline F32x16 exchange(F32x16 x) {
    if constexpr (distance == 8) return {x.high, x.low};
    const auto exchange_eight = [](__m256 eight) {
        if constexpr (distance == 4) return _mm256_permute2f128_ps(eight, eight, 1);
        return _mm256_permute_ps(eight, distance == 1 ? 0xb1 : 0x4e);
    };
    return {exchange_eight(x.low), exchange_eight(x.high)};
}

inline Mask16 less(F32x16 a, F32x16 b) {
    return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
inline Mask16 equal(F32x16 a, F32x16 b) {
    return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)};
}
inline Mask16 both(Mask16 a, Mask16 b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline Mask16 either(Mask16 a, Mask16 b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline Mask16 except(Mask16 a, Mask16 b) {
    return {_mm256_andnot_ps(b.low, a.low), _mm256_andnot_ps(b.high, a.high)};
}
inline uint32_t lane_bits(Mask16 m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.low)) |
           (static_cast<uint32_t>(_mm256_movemask_ps(m.high)) << 8);
}
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
    return {_mm256_blendv_ps(no.low, yes.low, m.low), _mm256_blendv_ps(no.high, yes.high, m.high)};
}
inline Mask16 finite(F32x16 x) {
    const auto below_infinity = [](__m256 y) {
        const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(0x7fffffff));
        return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(0x7f800000), magnitude));
    };
    return {below_infinity(x.low), below_infinity(x.high)};
}

// Clips to [0, top], then rounds to the nearest integer, ties to even. As integers, the bits of floats order
// like the floats when one side is not negative; integer min and max leave the multiply ports free.
inline Part round_code(Part x, Part top) {
    const __m256i low = _mm256_max_epi32(_mm256_castps_si256(x), _mm256_setzero_si256());
    const __m256i clipped = _mm256_min_epi32(low, _mm256_castps_si256(top));
    return _mm256_round_ps(_mm256_castsi256_ps(clipped), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32x16 round_code(F32x16 x, F32x16 top) { return {round_code(x.low, top.low), round_code(x.high, top.high)}; }
inline F32x16 round_nearest(F32x16 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}
inline Part round_nearest(Part x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Part from_nearest(Part x) { return sub(x, round_nearest(x)); }
inline F32x16 from_nearest(F32x16 x) { return sub(x, round_nearest(x)); }
inline I32x16 to_int(F32x16 x) { return {_mm256_cvttps_epi32(x.low), _mm256_cvttps_epi32(x.high)}; }
inline F32x16 to_float(I32x16 x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

// Sixteen codes of 32 bits as sixteen bytes, in order.
inline __m128i narrow_codes(I32x16 codes) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(codes.low, codes.high), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Sixteen codes as 2 * bits bytes, the first code in the lowest bits.
template <int bits>
inline void store_codes(uint8_t* p, I32x16 codes) {
    const __m128i bytes = narrow_codes(codes);
    if constexpr (bits == 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
        return;
    }
    // Each 16-bit lane: the even code plus the odd one shifted above it.
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(bits == 4 ? 0x1001 : 0x0401));
    if constexpr (bits == 4) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
    } else {
        const __m128i quads = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));
        const __m128i words = _mm_packus_epi32(quads, quads);
        _mm_storeu_si32(p, _mm_packus_epi16(words, words));
    }
}

// The same of 32 codes: operations that leave half of a register empty are shared.
template <int bits>
inline void store_vectors(uint8_t* p, const I32x16 (&codes)[vectors_of_codes]) {
    // As bytes, fours of codes 0, 2, 4, 6 in the low half and 1, 3, 5, 7 in the high one.
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(codes[0].low, codes[0].high),
                                              _mm256_packus_epi32(codes[1].low, codes[1].high));
    if constexpr (bits == 8) {
        const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, in_order));
        return;
    }
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(bits == 4 ? 0x1001 : 0x0401));
    if constexpr (bits == 4) {
        const __m256i fours = _mm256_packus_epi16(pairs, pairs);
        const __m128i even = _mm256_castsi256_si128(fours), odd = _mm256_extracti128_si256(fours, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi16(even, odd));
    } else {
        const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
        const __m256i words = _mm256_packus_epi32(quads, quads), fours = _mm256_packus_epi16(words, words);
        const __m128i even = _mm256_castsi256_si128(fours), odd = _mm256_extracti128_si256(fours, 1);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi8(even, odd));
    }
}

// Sixteen codes of 2 * bits bytes, one in the low bits of each lane; above a code there may be others. At 4 bits a byte
// goes to a lane of each half: `low` has the even codes, `high` the odd ones.
using SpreadCodes = I32x16;
template <int bits>
struct Spread {
    I32x16 operator()(const uint8_t* p) const {
        if constexpr (bits == 8) {
            return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
                    _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
        } else if constexpr (bits == 4) {
            const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
            return {pairs, _mm256_srli_epi32(pairs, 4)};
        } else {
            int32_t word;
            std::memcpy(&word, p, 4);
            const __m256i words = _mm256_set1_epi32(word);
            return {_mm256_srlv_epi32(words, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)),
                    _mm256_srlv_epi32(words, _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30))};
        }
    }
};
template <int bits>
inline F32x16 in_column_order(F32x16 x) {
    if constexpr (bits != 4) return x;
    const __m256 first = _mm256_unpacklo_ps(x.low, x.high), second = _mm256_unpackhi_ps(x.low, x.high);
    return {_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31)};
}
template <int bits>
inline I32x16 only_code(I32x16 codes) {
    if constexpr (bits == 8) return codes;
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    return {_mm256_and_si256(codes.low, mask), bits == 4 ? codes.high : _mm256_and_si256(codes.high, mask)};
}

// Levels of 64 codes in eight words of 4 bytes: vector v has the two codes in byte v of each word. What is loaded from
// byte v on has them in its lowest byte without a shift; it ends three bytes behind the codes, in scale and bias. A
// code in the high half of a byte counts sixteen times, for which a scale that was float16 has room.
template <class Levels>
inline F32x16 levels_of_words(const Levels& levels, const uint8_t* codes, size_t v) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + v));
    const I32x16 kept = {_mm256_and_si256(words, _mm256_set1_epi32(0x0f)),
                         _mm256_and_si256(words, _mm256_set1_epi32(0xf0))};
    const F32x16 scale = {levels.scale.low, _mm256_mul_ps(levels.scale.high, _mm256_set1_ps(1.0f / 16))};
    return fma(scale, to_float(kept), levels.bias);
}
template <class Sums>
inline void words_in_column_order(Sums& sums) {
    __m256 twos[8], fours[8];   // codes that follow each other, of words 0 .. 3 or 4 .. 7 mixed
    for (size_t v = 0; v < 4; v++) {
        twos[2 * v] = _mm256_unpacklo_ps(sums.vector[v].low, sums.vector[v].high);
        twos[2 * v + 1] = _mm256_unpackhi_ps(sums.vector[v].low, sums.vector[v].high);
    }
    for (size_t i = 0; i < 4; i++) {
        const size_t from = i / 2 * 4 + i % 2;
        const __m256d first = _mm256_castps_pd(twos[from]), second = _mm256_castps_pd(twos[from + 2]);
        fours[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(first, second));
        fours[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(first, second));
    }
    // Now fours[i] has the first four codes of words i and i + 4, fours[4 + i] the others.
    for (size_t v = 0; v < 2; v++) {
        const size_t i = 2 * v;
        sums.vector[v] = {_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20),
                          _mm256_permute2f128_ps(fours[i + 1], fours[i + 5], 0x20)};
        sums.vector[v + 2] = {_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31),
                              _mm256_permute2f128_ps(fours[i + 1], fours[i + 5], 0x31)};
    }
}

// The float of each code in a table of sixteen, by the low four bits.
inline F32x16 look_up(F32x16 table, I32x16 codes) {
    const auto look_up_eight = [&](__m256i eight) {
        const __m256 low = _mm256_permutevar8x32_ps(table.low, eight);
        const __m256 high = _mm256_permutevar8x32_ps(table.high, eight);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28)));
    };
    return {look_up_eight(codes.low), look_up_eight(codes.high)};
}

// Sixteen levels in float16, their low bytes and their high ones, in both halves of a register each: a shuffle looks 32
// codes up.
struct HalfLevels {
    __m256i low, high;

    explicit HalfLevels(const uint8_t* codebook) {
        const __m256i apart = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const auto load_eight = [&](size_t i) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook) + i);
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), apart);
        };
        const __m256i first = load_eight(0), second = load_eight(1);
        low = _mm256_unpacklo_epi64(first, second);
        high = _mm256_unpackhi_epi64(first, second);
    }
};

// The levels of a tile of a row in float16, in memory: there halves of registers cost nothing, and the conversion is
// one operation, two from a register.
template <size_t vectors, bool has_last>
struct Halves {
    using Levels = HalfLevels;

    alignas(32) uint16_t values[16 * (vectors + has_last)];

    [[gnu::always_inline]] void look_up(const HalfLevels& levels, const uint8_t* codes) {
        static_assert(vectors <= 2 || vectors == 4);
        const __m256i code = _mm256_set1_epi8(0x0f);
        if constexpr (vectors == 4) {
            const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            // Shifted down by a multiplication: shuffles need the ports that shift (Zen).
            const __m256i shifted = _mm256_mulhi_epu16(pairs, _mm256_set1_epi16(1 << 12));
            const __m256i even = _mm256_and_si256(pairs, code), odd = _mm256_and_si256(shifted, code);
            look_32_up(levels, _mm256_unpacklo_epi8(even, odd), values);
            look_32_up(levels, _mm256_unpackhi_epi8(even, odd), values + 32);
        } else if constexpr (vectors == 2) {
            const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
            look_32_up(levels, _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), code), values);
        } else if constexpr (vectors == 1) {
            look_16_up(levels, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), values);
        }
        asm("" : "+m"(values));   // GCC would rather take registers apart than read from here.
    }
    [[gnu::always_inline]] void look_last_up(const HalfLevels& levels, uint64_t codes) {
        look_16_up(levels, _mm_cvtsi64_si128(static_cast<int64_t>(codes)), values + 16 * vectors);
        asm("" : "+m"(values));
    }
    [[gnu::always_inline]] F32x16 operator[](size_t v) const { return {eight_at(2 * v), eight_at(2 * v + 1)}; }

private:
    [[gnu::always_inline]] static void look_32_up(const HalfLevels& levels, __m256i codes, uint16_t* to) {
        const __m256i low = _mm256_shuffle_epi8(levels.low, codes), high = _mm256_shuffle_epi8(levels.high, codes);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(low, high));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_unpackhi_epi8(low, high));
    }
    [[gnu::always_inline]] static void look_16_up(const HalfLevels& levels, __m128i bytes, uint16_t* to) {
        const __m128i pairs = _mm_cvtepu8_epi16(bytes);
        const __m128i codes = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(0x0f));
        const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(levels.low), codes);
        const __m128i high = _mm_shuffle_epi8(_mm256_castsi256_si128(levels.high), codes);
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(low, high));
        _mm_store_si128(reinterpret_cast<__m128i*>(to + 8), _mm_unpackhi_epi8(low, high));
    }
    // Two registers of codes, or two halves of one, are looked up at once, so columns lie eight by eight in turn.
    [[gnu::always_inline]] __m256 eight_at(size_t eight) const {
        constexpr size_t period = vectors > 1 ? vectors : 1;
        const bool are_in_turn = vectors > 1 && eight < 2 * vectors;
        const size_t at = are_in_turn ? eight % period * 16 + eight / period * 8 : 8 * eight;
        return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(values + at)));
    }
};

// The same with tables of 2^bits floats, at most 64, of which at least sixteen can be read.
template <int bits>
inline F32x16 look_up_in(const float* table, I32x16 indices) {
    if constexpr (bits <= 3) {
        const __m256 eight = _mm256_loadu_ps(table);
        return {_mm256_permutevar8x32_ps(eight, indices.low), _mm256_permutevar8x32_ps(eight, indices.high)};
    } else if constexpr (bits <= 4) {
        return look_up(load(table), indices);
    } else {
        return {_mm256_i32gather_ps(table, indices.low, 4), _mm256_i32gather_ps(table, indices.high, 4)};
    }
}
inline I32x16 splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32x16 load_int(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline I32x16 load_words(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline I32x16 and_int(I32x16 a, I32x16 b) {
    return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline I32x16 shift_right(I32x16 x, int count) {
    return {_mm256_srli_epi32(x.low, count), _mm256_srli_epi32(x.high, count)};
}
inline Mask16 has_bit(I32x16 x, size_t bit) {
    const __m256i bits = _mm256_set1_epi32(1 << bit);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(x.low, bits), bits)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(x.high, bits), bits))};
}
inline I32x16 add_int(I32x16 a, I32x16 b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline I32x16 select_int(Mask16 m, I32x16 yes, I32x16 no) {
    return {_mm256_blendv_epi8(no.low, yes.low, _mm256_castps_si256(m.low)),
            _mm256_blendv_epi8(no.high, yes.high, _mm256_castps_si256(m.high))};
}

template <class Fn>
inline F64x16 each_quarter(Fn fn) {
    return {{fn(0), fn(1), fn(2), fn(3)}};
}
inline F64x16 splat_f64(double x) {
    return each_quarter([x](int) { return _mm256_set1_pd(x); });
}
inline F64x16 load_f64(const double* p) {
    return each_quarter([p](int i) { return _mm256_loadu_pd(p + 4 * i); });
}
inline F64x16 widen_f32(F32x16 x) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.low)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)),
             _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1))}};
}
inline F64x16 add(const F64x16& a, const F64x16& b) {
    return each_quarter([&](int i) { return _mm256_add_pd(a.quarter[i], b.quarter[i]); });
}
inline F64x16 sub(const F64x16& a, const F64x16& b) {
    return each_quarter([&](int i) { return _mm256_sub_pd(a.quarter[i], b.quarter[i]); });
}
inline F64x16 mul(const F64x16& a, const F64x16& b) {
    return each_quarter([&](int i) { return _mm256_mul_pd(a.quarter[i], b.quarter[i]); });
}
inline Mask16 less(const F64x16& a, const F64x16& b) {
    const auto narrow_masks = [&](int i) {   // The even halves of eight 64-bit masks are their 32-bit ones.
        const __m256 first = _mm256_castpd_ps(_mm256_cmp_pd(a.quarter[i], b.quarter[i], _CMP_LT_OQ));
        const __m256 second = _mm256_castpd_ps(_mm256_cmp_pd(a.quarter[i + 1], b.quarter[i + 1], _CMP_LT_OQ));
        const __m256 mixed = _mm256_shuffle_ps(first, second, 0x88);
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
    };
    return {narrow_masks(0), narrow_masks(2)};
}
inline F64x16 select(Mask16 m, const F64x16& yes, const F64x16& no) {
    const auto blend = [&](int i, __m256 half, int which) {
        const __m128 lanes = which == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1);
        const __m256i wide = _mm256_cvtepi32_epi64(_mm_castps_si128(lanes));
        return _mm256_blendv_pd(no.quarter[i], yes.quarter[i], _mm256_castsi256_pd(wide));
    };
    return {{blend(0, m.low, 0), blend(1, m.low, 1), blend(2, m.high, 0), blend(3, m.high, 1)}};
}
inline F64x16 zero_f64() {
    const __m256d zero = _mm256_setzero_pd();
    return {{zero, zero, zero, zero}};
}
inline F64x16 add_square(F64x16 sum, F32x16 x) {
    const auto add_four = [](__m256d quarter, __m128 y) {
        const __m256d wide = _mm256_cvtps_pd(y);
        return _mm256_fmadd_pd(wide, wide, quarter);
    };
    return {{add_four(sum.quarter[0], _mm256_castps256_ps128(x.low)),
             add_four(sum.quarter[1], _mm256_extractf128_ps(x.low, 1)),
             add_four(sum.quarter[2], _mm256_castps256_ps128(x.high)),
             add_four(sum.quarter[3], _mm256_extractf128_ps(x.high, 1))}};
}
inline F64x16 add_f32(F64x16 sum, F32x16 x) {
    const auto add_four = [](__m256d quarter, __m128 y) { return _mm256_add_pd(quarter, _mm256_cvtps_pd(y)); };
    return {{add_four(sum.quarter[0], _mm256_castps256_ps128(x.low)),
             add_four(sum.quarter[1], _mm256_extractf128_ps(x.low, 1)),
             add_four(sum.quarter[2], _mm256_castps256_ps128(x.high)),
             add_four(sum.quarter[3], _mm256_extractf128_ps(x.high, 1))}};
}
inline void store_f64(double* p, F64x16 x) {
    for (size_t i = 0; i < 4; i++) _mm256_storeu_pd(p + 4 * i, x.quarter[i]);
}

// out[j * lanes + i] = rows[i * stride + j] for 8 rows and 8 columns.
inline void transpose_8x8(const float* rows, size_t stride, float* out) {
    __m256 a[8], b[8];
    for (size_t i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(rows + i * stride);
    for (size_t i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (size_t i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (size_t k = 0; k < 4; k++) {
        _mm256_storeu_ps(out + lanes * k, _mm256_permute2f128_ps(a[k], a[4 + k], 0x20));
        _mm256_storeu_ps(out + lanes * (4 + k), _mm256_permute2f128_ps(a[k], a[4 + k], 0x31));
    }
}

inline void transpose_16x16(const float* rows, size_t stride, float* out) {
    for (size_t i = 0; i < 16; i += 8)
        for (size_t j = 0; j < 16; j += 8) transpose_8x8(rows + i * stride + j, stride, out + j * lanes + i);
}

// pick_of_rows (kernels/rows-inl.h): neighbouring lanes of two rows, then of four and eight, a third of the operations
// that turning all rows over takes.
template <class Pick>
inline F32x16 pick_of_rows_in_parts(const float* rows, const Pick& pick) {
    const auto pick_neighbours = [&pick](__m256 a, __m256 b) {
        return pick(_mm256_shuffle_ps(a, b, 0xdd), _mm256_shuffle_ps(a, b, 0x88));
    };
    const auto of_eight = [&](const float* eight) {
        const auto of_two = [&](size_t row) {
            return pick_neighbours(_mm256_loadu_ps(eight + lanes * row), _mm256_loadu_ps(eight + lanes * (row + 1)));
        };
        const __m256 first = pick_neighbours(of_two(0), of_two(2)), second = pick_neighbours(of_two(4), of_two(6));
        return pick(_mm256_permute2f128_ps(first, second, 0x31), _mm256_permute2f128_ps(first, second, 0x20));
    };
    return {pick(of_eight(rows + 8), of_eight(rows)), pick(of_eight(rows + 8 * lanes + 8), of_eight(rows + 8 * lanes))};
}

#include "avx2_exact-inl.h"

}  // namespace
}  // namespace embpack::EMBPACK_ISA
