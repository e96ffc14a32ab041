// Exact sums of 4-bit rows in integers, with AVX2: two rows at a time. kernels/exact_sums-inl.h says what they are for.

template <class Fold>
[[gnu::always_inline]] inline uint32_t fold_lanes(__m256i x, const Fold& fold) {
    __m128i folded = fold(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    folded = fold(folded, _mm_srli_si128(folded, 8));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(fold(folded, _mm_srli_si128(folded, 4))));
}

struct ExactTiles {
    // The sums of the codes at four places of 16 bits. No array: with one, GCC keeps sums in memory.
    struct FourSums {
        __m256i s0, s1, s2, s3;
    };

    struct Wide {
        static constexpr size_t columns = 64, rows_at_once = 2;

        // Codes of rows 0 and 1, and their multipliers in the two halves of each lane.
        static void load(const uint8_t* const* rows, size_t first_byte, const int16_t* multipliers, __m256i& even,
                         __m256i& odd, __m256i& by) {
            const auto codes = [&](size_t i) {
                return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + first_byte));
            };
            even = codes(0);
            odd = codes(1);
            int32_t two;
            std::memcpy(&two, multipliers, sizeof two);
            by = _mm256_set1_epi32(two);
        }
    };
    // Rows 0 and 1 in the lower halves of registers, rows 2 and 3 in the upper ones; their sums are joined at the end.
    struct Narrow {
        static constexpr size_t columns = 32, rows_at_once = 4;

        static void load(const uint8_t* const* rows, size_t first_byte, const int16_t* multipliers, __m256i& even,
                         __m256i& odd, __m256i& by) {
            const auto codes = [&](size_t i) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + first_byte));
            };
            even = _mm256_inserti128_si256(_mm256_castsi128_si256(codes(0)), codes(2), 1);
            odd = _mm256_inserti128_si256(_mm256_castsi128_si256(codes(1)), codes(3), 1);
            int64_t four;
            std::memcpy(&four, multipliers, sizeof four);
            const __m256 twos = _mm256_castsi256_ps(_mm256_set1_epi64x(four));
            by = _mm256_castps_si256(_mm256_permutevar_ps(twos, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
        }
        static FourSums join(FourSums first, FourSums second) {
            const auto join_two = [](__m256i a, __m256i b) {
                return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
            };
            return {join_two(first.s0, second.s0), join_two(first.s1, second.s1), join_two(first.s2, second.s2),
                    join_two(first.s3, second.s3)};
        }
    };

    // The sums of four codes that follow each other, of each lane, to where they belong: a lane's to the columns that
    // follow those of the lane before it, and the upper half's `distance` columns behind the lower half's.
    static void put_sums(FourSums sums, ExactSum exact, float* to, size_t distance) {
        const __m256 unit = _mm256_set1_ps(exact.unit), bias = _mm256_set1_ps(exact.bias);
        const auto level = [&](__m256i sum, __m256 each) { return _mm256_fmadd_ps(each, _mm256_cvtepi32_ps(sum), bias); };
        // Codes were multiplied where they lie in 16 bits. Those at the third place are up to 2^32 - 256.
        const __m256 s0 = level(sums.s0, unit), s1 = level(sums.s1, _mm256_mul_ps(unit, _mm256_set1_ps(1.0f / 16)));
        const __m256 s2 = level(_mm256_srli_epi32(sums.s2, 8), unit), s3 = level(sums.s3, unit);
        const __m256 low01 = _mm256_unpacklo_ps(s0, s1), high01 = _mm256_unpackhi_ps(s0, s1);
        const __m256 low23 = _mm256_unpacklo_ps(s2, s3), high23 = _mm256_unpackhi_ps(s2, s3);
        const __m256 lane0 = _mm256_shuffle_ps(low01, low23, 0x44), lane1 = _mm256_shuffle_ps(low01, low23, 0xee);
        const __m256 lane2 = _mm256_shuffle_ps(high01, high23, 0x44), lane3 = _mm256_shuffle_ps(high01, high23, 0xee);
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(lane0, lane1, 0x20));
        _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(lane2, lane3, 0x20));
        _mm256_storeu_ps(to + distance, _mm256_permute2f128_ps(lane0, lane1, 0x31));
        _mm256_storeu_ps(to + distance + 8, _mm256_permute2f128_ps(lane2, lane3, 0x31));
    }

    // Of the parameters of so many rows, a multiple of four.
    static ParamRange find_range(const uint32_t* params, size_t num_rows) {
        __m256i least = _mm256_set1_epi16(-1), most = _mm256_setzero_si256();
        const auto take = [&](__m256i scales_and_biases) {
            most = _mm256_max_epu16(most, _mm256_and_si256(scales_and_biases, _mm256_set1_epi32(0x7fffffff)));
            const __m256i magnitudes = _mm256_and_si256(scales_and_biases, _mm256_set1_epi16(0x7fff));
            least = _mm256_min_epu16(least, _mm256_sub_epi16(magnitudes, _mm256_set1_epi16(1)));   // 0: the largest
        };
        size_t i = 0;
        for (; i + 8 <= num_rows; i += 8) take(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(params + i)));
        if (i < num_rows)
            take(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(params + i))));
        return {fold_lanes(least, [](__m128i a, __m128i b) { return _mm_min_epu16(a, b); }),
                fold_lanes(most, [](__m128i a, __m128i b) { return _mm_max_epu16(a, b); })};
    }

    // Scales as multiples of the unit, and biases as float32, of so many rows and of those left of eight.
    static void split_params(const uint32_t* params, size_t num_rows, float unit, int16_t* multipliers, float* biases) {
        const __m256 multiple = _mm256_set1_ps(1 / unit);
        for (size_t i = 0; i < num_rows; i += 8) {
            const auto load_four = [&](size_t at) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(params + at));
            };
            const __m128i lower = load_four(i), upper = load_four(i + 4);
            // Rows 0, 1, 4, 5 and 2, 3, 6, 7: halves of registers are shuffled by themselves.
            const __m256 first = _mm256_cvtph_ps(_mm_unpacklo_epi64(lower, upper));
            const __m256 second = _mm256_cvtph_ps(_mm_unpackhi_epi64(lower, upper));
            const __m256 scales = _mm256_shuffle_ps(first, second, 0x88);
            _mm256_storeu_ps(biases + i, _mm256_shuffle_ps(first, second, 0xdd));
            const __m256i whole = _mm256_cvttps_epi32(_mm256_mul_ps(scales, multiple));
            const __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(multipliers + i), eight);
        }
    }

    // Of a multiple of four.
    static float add_biases(const float* biases, size_t count) {
        __m128 sum = _mm_setzero_ps();
        for (size_t i = 0; i < count; i += 4) sum = _mm_add_ps(sum, _mm_loadu_ps(biases + i));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
    }

    // The sums of a tile, from byte `first_byte` of the rows on. For as many rows as are missing to a whole turn there
    // are multipliers, 0, and rows, any.
    template <class Tile, class AfterTurn>
    [[gnu::always_inline]] static void sum(const uint8_t* const* rows, const int16_t* multipliers, size_t num_rows,
                                           size_t first_byte, ExactSum exact, float* to, const AfterTurn& after_turn) {
        const __m256i zero = _mm256_setzero_si256();
        FourSums first = {zero, zero, zero, zero}, second = first;   // of the lower and upper halves of each 16 bytes
        __m256i code0 = _mm256_set1_epi16(0x000f), code1 = _mm256_set1_epi16(0x00f0), code2 = _mm256_set1_epi16(0x0f00);
        asm("" : "+x"(code0), "+x"(code1), "+x"(code2));   // GCC would load them each time.
        for (size_t i = 0; i < num_rows; i += Tile::rows_at_once) {
            __m256i even, odd, by;
            Tile::load(rows + i, first_byte, multipliers + i, even, odd, by);
            // Two codes of a column side by side: the operation that makes their products adds them. In order, by an
            // empty statement: all at once, they do not fit the registers.
            const auto add = [&](__m256i& sum, __m256i codes) __attribute__((always_inline)) {
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes, by));
                asm volatile("" : "+x"(sum));
            };
            const auto add_four = [&](FourSums& sums, __m256i words) __attribute__((always_inline)) {
                add(sums.s0, _mm256_and_si256(words, code0));
                add(sums.s1, _mm256_and_si256(words, code1));
                add(sums.s2, _mm256_and_si256(words, code2));
                add(sums.s3, _mm256_srli_epi16(words, 12));
            };
            add_four(first, _mm256_unpacklo_epi16(even, odd));
            add_four(second, _mm256_unpackhi_epi16(even, odd));
            after_turn(i);
        }
        if constexpr (Tile::columns == 64) {
            put_sums(first, exact, to, 32);
            put_sums(second, exact, to + 16, 32);
        } else {
            put_sums(Tile::join(first, second), exact, to, 16);
        }
    }
};
