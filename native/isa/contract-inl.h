// The contract of an instruction set: what isa/NAME-inl.h must define, each thing with its type and what it does. A new
// one is written from this page, top to bottom, beside portable-inl.h, which does everything in plain C++; whatever is
// missing or has another type, compiling a unit says here, by its line. Native tests hold the results to portable's, bit
// for bit. What lookups of trellis-coded rows need besides, in isa/NAME_trellis-inl.h, kernels/trellis_blocks-inl.h
// lists.
//
// A vector has sixteen lanes, whatever registers it is made of. Floats are rounded once in every operation, to nearest,
// ties to even; nothing is contracted.

// TYPES. A mask has a yes or no for each lane.
static_assert(sizeof(F32x16) == 64 && sizeof(I32x16) == 64 && sizeof(F64x16) == 128, "sixteen lanes each");
static_assert(sizeof(Mask16) > 0 && sizeof(SpreadCodes) > 0, "SpreadCodes are sixteen codes as Spread makes them");

static_assert(sizeof(Part) * parts == sizeof(F32x16),
              "a register of a vector, or the whole vector: loops with many vectors take a part at a time");

// CONSTANTS, all constexpr. They choose between ways that give the same bits.
static_assert(std::is_same_v<decltype(has_fast_fma), const bool>,
              "a fused multiply-add is an instruction, not the C library's function");
static_assert(std::is_same_v<decltype(looks_up_in_one), const bool>,
              "look_up takes less than a multiply-add, so rows have tables");
static_assert(std::is_same_v<decltype(looks_halves_up), const bool>,
              "there are Halves, float16 levels of a row looked up byte by byte");
static_assert(most_sums >= 1 && most_sums <= 16, "vectors of sums that stay in registers, a power of two");
static_assert(product_sums >= 1 && product_sums <= 16, "vectors of sums of products that stay in registers, a power of two");
static_assert(rows_early < 4, "rows whose levels are read before they are added");
static_assert(starts_at_once >= 1, "ranges that `optimal` goes on with together");
static_assert(starts_at_once % sums_at_once == 0, "of these, ranges that it makes sums for in one pass");
static_assert(std::is_same_v<decltype(notes_overflow), const bool>, "the CPU notes what store_f16 cannot hold");
static_assert(std::is_same_v<decltype(picks_of_rows), const bool>, "there is pick_of_rows_in_parts");
static_assert(vectors_of_codes >= 1, "vectors of codes that store_vectors stores together; 1: there is no such function");
static_assert(vectors_of_words <= 4, "vectors that levels_of_words makes together; 0: there is no such function");

// Never called: it compiles if all is there.
[[maybe_unused]] inline void check_contract(F32x16 x, I32x16 codes, SpreadCodes spread, Mask16 mask, F64x16 wide,
                                            size_t n, const float* p, const uint16_t* halves, const uint8_t* bytes,
                                            const int32_t* ints, const double* doubles, float* out,
                                            uint16_t* halves_out, uint8_t* bytes_out, double* doubles_out,
                                            uint32_t& lanes_set) {
    // LOADS AND STORES. Addresses need no alignment. n lanes are 0 .. 16, and nothing after them is touched.
    x = splat(1.0f);                                    // all lanes
    x = splat_at(p);                                    // the float at p, by a load where there is one
    x = load(p);
    x = load_first(p, n);                               // n of them; 0 in the other lanes
    store(out, x);
    store_first(out, x, n);
    x = load_f16(halves);
    x = load_bf16(halves);
    store_f16(halves_out, x);
    forget_overflow();                                  // only used where notes_overflow
    has_noted_overflow();                               // since then: a finite value has become infinity in store_f16
    widen_two_f16(bytes, out);                          // two float16, to where there is room for four
    stay_in_register(x);                                // may do nothing

    // ARITHMETIC
    x = add(x, x);
    x = sub(x, x);
    x = mul(x, x);
    x = div(x, x);
    x = fma(x, x, x);                                   // a * b + c, rounded once
    x = sqrt(x);
    x = magnitude(x);
    x = min(x, x);                                      // the second where they are equal or one is NaN
    x = max(x, x);
    x = exchange<1>(x);                                 // lane i gets lane i ^ distance: 1, 2, 4, 8
    x = exchange<8>(x);

    // PARTS. load_part and splat_part fill one; add, sub, mul, fma, round_nearest, from_nearest and round_code take them
    // as they take vectors.
    Part part = load_part(p);
    part = fma(part, splat_part(1.0f), add(part, part));
    part = mul(sub(part, part), from_nearest(part));
    part = round_code(round_nearest(part), part);
    part_of(x, n) = part;                               // part n, below parts
    part = part_of(static_cast<const F32x16&>(x), n);

    // ROUNDING
    x = round_f16(x);                                   // to float16 and back
    x = round_nearest(x);                               // to an integer, right below 2^22
    x = from_nearest(x);                                // x - round_nearest(x)
    x = round_code(x, x);                               // clipped to 0 .. top by its bits, then rounded
    codes = to_int(x);                                  // of integers
    x = to_float(codes);

    // MASKS
    mask = first_lanes(n);
    mask = less(x, x);                                  // no, if one is NaN
    mask = equal(x, x);
    mask = finite(x);
    mask = both(mask, mask);
    mask = either(mask, mask);
    mask = except(mask, mask);                          // the first and not the second
    lanes_set = lane_bits(mask);                        // bit i is lane i
    x = select(mask, x, x);                             // yes, no

    // INTEGERS
    codes = splat_int(1);
    codes = load_int(ints);
    codes = load_words(bytes);                          // sixteen words of four bytes
    codes = add_int(codes, codes);
    codes = and_int(codes, codes);
    codes = shift_right(codes, 4);                      // zeros move in
    codes = select_int(mask, codes, codes);
    mask = has_bit(codes, n);

    // CODES of 2, 4 or 8 bits: sixteen of them are 2 * bits bytes, the first code in the lowest bits. Codes may be
    // spread over the lanes in an order of their own, and bits above a code may be set, whatever is quickest:
    // in_column_order and only_code put that right.
    store_codes<4>(bytes_out, codes);
    spread = Spread<4>()(bytes);                        // an object: it may keep constants in registers
    x = in_column_order<4>(x);
    codes = only_code<4>(spread);
    x = look_up(x, spread);                             // entries of sixteen, by the lowest four bits
    x = look_up_in<6>(p, codes);                        // entries of 2^bits, 2 <= bits <= 6

    // DOUBLES
    wide = zero_f64();
    wide = splat_f64(1.0);
    wide = load_f64(doubles);
    store_f64(doubles_out, wide);
    wide = widen_f32(x);
    wide = add(wide, wide);
    wide = sub(wide, wide);
    wide = mul(wide, wide);
    wide = add_f32(wide, x);
    wide = add_square(wide, x);                         // + x * x, rounded once
    mask = less(wide, wide);
    wide = select(mask, wide, wide);

    // TRANSPOSITION: out[16 * j + i] = rows[i * stride + j] for 16 rows and 16 columns.
    transpose_16x16(p, n, out);
}

// Where picks_of_rows: pick_of_rows_in_parts(rows, pick), see kernels/rows-inl.h.
// Where vectors_of_codes > 1: store_vectors<bits>(bytes, codes), see avx2-inl.h.
// Where looks_up_in_one: splat_two_f16(p, first, second), the two float16 at p, each to all lanes.
// Where vectors_of_words > 0: levels_of_words and words_in_column_order, see avx2-inl.h.
// Where looks_halves_up: Halves<vectors, has_last>, what kernels/halves-inl.h asks of it, see avx2-inl.h. `look_up` is
// for the first sixteen codes times `vectors`, which is a shape of a tile; `look_last_up` for sixteen more.
// Where ExactTiles is not void: what kernels/exact_sums-inl.h asks of it, see avx2_exact-inl.h.
