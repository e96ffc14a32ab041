// Vectors of AVX-512 (F, BW, DQ, VL: Skylake-X and later, Zen 4 and later): sixteen lanes are one register.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "x86_overflow-inl.h"

namespace embpack::EMBPACK_ISA {
namespace {

using F32x16 = __m512;
using I32x16 = __m512i;
using Mask16 = __mmask16;
struct F64x16 {
    __m512d low, high;
};

constexpr bool has_fast_fma = true;
constexpr bool looks_up_in_one = true;
constexpr bool looks_halves_up = false;
constexpr size_t most_sums = 16;   // vectors of sums that stay in registers
constexpr size_t product_sums = 8;   // those of products: as many as hide how long a multiply-add takes
constexpr size_t rows_early = 2;    // rows whose levels are read before they are added
constexpr size_t starts_at_once = 2;   // ranges that `optimal` goes on with together
constexpr size_t sums_at_once = 2;   // ranges that it makes sums for in one pass
constexpr bool picks_of_rows = false;
constexpr size_t vectors_of_codes = 1;
constexpr size_t vectors_of_words = 0;   // none, see avx2.cpp
using ExactTiles = void;   // sums are added level by level

// Keeps GCC from loading a constant again for each use, when loads are what bounds a loop.
inline void stay_in_register(F32x16& x) { asm("" : "+v"(x)); }
inline void stay_in_register(I32x16& x) { asm("" : "+v"(x)); }

inline Mask16 first_lanes(size_t n) { return static_cast<Mask16>((1u << n) - 1); }

inline F32x16 splat(float x) { return _mm512_set1_ps(x); }
inline F32x16 splat_at(const float* p) { return splat(*p); }
inline F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
#include "whole_part-inl.h"
inline F32x16 load_first(const float* p, size_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x); }
inline void store_first(float* p, F32x16 x, size_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

inline F32x16 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The two float16 at p, each to all lanes: one load, and four operations that other ports can share.
inline void splat_two_f16(const uint8_t* p, F32x16& first, F32x16& second) {
    int32_t two;
    std::memcpy(&two, p, 4);
    const __m512 alternating = _mm512_cvtph_ps(_mm256_set1_epi32(two));
    first = _mm512_moveldup_ps(alternating);
    second = _mm512_movehdup_ps(alternating);
}
// The same, to where there is room for four.
inline void widen_two_f16(const uint8_t* p, float* to) {
    int32_t two;
    std::memcpy(&two, p, 4);
    _mm_storeu_ps(to, _mm_cvtph_ps(_mm_cvtsi32_si128(two)));
}
inline F32x16 load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_f16(uint16_t* p, F32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F32x16 round_f16(F32x16 x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline F32x16 add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
inline F32x16 sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
inline F32x16 mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
inline F32x16 div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32x16 sqrt(F32x16 a) { return _mm512_sqrt_ps(a); }
inline F32x16 magnitude(F32x16 a) { return _mm512_abs_ps(a); }
inline F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
inline F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }

// In each lane what the lane that many away has: i ^ distance.
template <size_t distance>
inline F32x16 exchange(F32x16 x) {
    if constexpr (distance < 4) return _mm512_permute_ps(x, distance == 1 ? 0xb1 : 0x4e);
    return _mm512_shuffle_f32x4(x, x, distance == 4 ? 0xb1 : 0x4e);
}

inline Mask16 less(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask16 equal(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask16 both(Mask16 a, Mask16 b) { return static_cast<Mask16>(a & b); }
inline Mask16 either(Mask16 a, Mask16 b) { return static_cast<Mask16>(a | b); }
inline Mask16 except(Mask16 a, Mask16 b) { return static_cast<Mask16>(a & ~b); }
inline uint32_t lane_bits(Mask16 m) { return m; }
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) { return _mm512_mask_blend_ps(m, no, yes); }
inline Mask16 finite(F32x16 x) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
}

// Clips to [0, top], then rounds to the nearest integer, ties to even. As integers, the bits of floats order
// like the floats when one side is not negative; integer min and max leave the two multiply ports free.
inline F32x16 round_code(F32x16 x, F32x16 top) {
    const __m512i low = _mm512_max_epi32(_mm512_castps_si512(x), _mm512_setzero_si512());
    const __m512i clipped = _mm512_min_epi32(low, _mm512_castps_si512(top));
    return _mm512_roundscale_ps(_mm512_castsi512_ps(clipped), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32x16 round_nearest(F32x16 x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x - round_nearest(x), in one operation where rounding takes two.
inline F32x16 from_nearest(F32x16 x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline I32x16 to_int(F32x16 x) { return _mm512_cvttps_epi32(x); }
inline F32x16 to_float(I32x16 x) { return _mm512_cvtepi32_ps(x); }

// Sixteen codes as 2 * bits bytes, the first code in the lowest bits.
template <int bits>
inline void store_codes(uint8_t* p, I32x16 codes) {
    if constexpr (bits == 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
    } else if constexpr (bits == 4) {
        const __m512i pairs = _mm512_or_si512(codes, _mm512_srli_epi64(codes, 28));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
    } else {
        const __m512i pairs = _mm512_or_si512(codes, _mm512_srli_epi64(codes, 30));
        const __m128i halves = _mm512_cvtepi64_epi8(pairs);   // eight bytes of two codes
        const __m128i quads = _mm_or_si128(halves, _mm_srli_epi16(halves, 4));
        const __m128i even = _mm_setr_epi8(0, 2, 4, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        _mm_storeu_si32(p, _mm_shuffle_epi8(quads, even));
    }
}

// Sixteen codes of 2 * bits bytes, one in the low bits of each lane; above a code there may be others. At 4 bits, lanes
// 2i and 2i + 1 have codes i and 8 + i: so loading both halves to all lanes needs no permutation, only a load.
using SpreadCodes = I32x16;
template <int bits>
struct Spread {
    I32x16 shifts = bits == 4 ? _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28)
                              : _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);

    Spread() { stay_in_register(shifts); }
    I32x16 operator()(const uint8_t* p) const {
        if constexpr (bits == 8) {
            return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        } else if constexpr (bits == 4) {
            int64_t word;
            std::memcpy(&word, p, 8);
            return _mm512_srlv_epi32(_mm512_set1_epi64(word), shifts);
        } else {
            int32_t word;
            std::memcpy(&word, p, 4);
            return _mm512_srlv_epi32(_mm512_set1_epi32(word), shifts);
        }
    }
};
template <int bits>
inline F32x16 in_column_order(F32x16 x) {
    if constexpr (bits != 4) return x;
    const __m512i lane_of_column = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm512_permutexvar_ps(lane_of_column, x);
}
template <int bits>
inline I32x16 only_code(I32x16 codes) {
    return bits == 8 ? codes : _mm512_and_si512(codes, _mm512_set1_epi32((1 << bits) - 1));
}

// The float of each code in a table of sixteen, by the low four bits.
inline F32x16 look_up(F32x16 table, I32x16 codes) { return _mm512_permutexvar_ps(codes, table); }

// The same with tables of 2^bits floats, at most 64.
template <int bits>
inline F32x16 look_up_in(const float* table, I32x16 indices) {
    if constexpr (bits <= 4) return look_up(load(table), indices);
    const __m512 first = _mm512_permutex2var_ps(load(table), indices, load(table + 16));
    if constexpr (bits <= 5) return first;
    const __m512 second = _mm512_permutex2var_ps(load(table + 32), indices, load(table + 48));
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(indices, _mm512_set1_epi32(32)), first, second);
}
inline I32x16 splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline I32x16 load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
inline I32x16 load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I32x16 and_int(I32x16 a, I32x16 b) { return _mm512_and_si512(a, b); }
inline I32x16 shift_right(I32x16 x, int count) { return _mm512_srli_epi32(x, static_cast<unsigned>(count)); }
inline Mask16 has_bit(I32x16 x, size_t bit) { return _mm512_test_epi32_mask(x, _mm512_set1_epi32(1 << bit)); }
inline I32x16 add_int(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
inline I32x16 select_int(Mask16 m, I32x16 yes, I32x16 no) { return _mm512_mask_blend_epi32(m, no, yes); }

inline F64x16 splat_f64(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline F64x16 load_f64(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline F64x16 widen_f32(F32x16 x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
inline F64x16 add(F64x16 a, F64x16 b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
inline F64x16 sub(F64x16 a, F64x16 b) { return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)}; }
inline F64x16 mul(F64x16 a, F64x16 b) { return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)}; }
inline Mask16 less(F64x16 a, F64x16 b) {
    const __mmask8 low = _mm512_cmp_pd_mask(a.low, b.low, _CMP_LT_OQ);
    const __mmask8 high = _mm512_cmp_pd_mask(a.high, b.high, _CMP_LT_OQ);
    return static_cast<Mask16>(low | (high << 8));
}
inline F64x16 select(Mask16 m, F64x16 yes, F64x16 no) {
    return {_mm512_mask_blend_pd(static_cast<__mmask8>(m), no.low, yes.low),
            _mm512_mask_blend_pd(static_cast<__mmask8>(m >> 8), no.high, yes.high)};
}
inline F64x16 zero_f64() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline F64x16 add_square(F64x16 sum, F32x16 x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return {_mm512_fmadd_pd(low, low, sum.low), _mm512_fmadd_pd(high, high, sum.high)};
}
inline F64x16 add_f32(F64x16 sum, F32x16 x) {
    return {_mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x))),
            _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
}
inline void store_f64(double* p, F64x16 x) {
    _mm512_storeu_pd(p, x.low);
    _mm512_storeu_pd(p + 8, x.high);
}

// out[j * lanes + i] = rows[i * stride + j] for 16 rows and 16 columns.
inline void transpose_16x16(const float* rows, size_t stride, float* out) {
    __m512 a[16], b[16];
    for (size_t i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(rows + i * stride);
    for (size_t i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    const auto low_pd = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto high_pd = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    // a[i + k] holds, in its 128-bit quarter q, column 4q + k of rows i .. i + 3.
    for (size_t i = 0; i < 16; i += 4) {
        a[i] = low_pd(b[i], b[i + 2]);
        a[i + 1] = high_pd(b[i], b[i + 2]);
        a[i + 2] = low_pd(b[i + 1], b[i + 3]);
        a[i + 3] = high_pd(b[i + 1], b[i + 3]);
    }
    for (size_t k = 0; k < 4; k++) {
        const __m512 top01 = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x44);
        const __m512 top23 = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xee);
        const __m512 low01 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x44);
        const __m512 low23 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xee);
        _mm512_storeu_ps(out + lanes * k, _mm512_shuffle_f32x4(top01, low01, 0x88));
        _mm512_storeu_ps(out + lanes * (4 + k), _mm512_shuffle_f32x4(top01, low01, 0xdd));
        _mm512_storeu_ps(out + lanes * (8 + k), _mm512_shuffle_f32x4(top23, low23, 0x88));
        _mm512_storeu_ps(out + lanes * (12 + k), _mm512_shuffle_f32x4(top23, low23, 0xdd));
    }
}

}  // namespace
}  // namespace embpack::EMBPACK_ISA
