// Lookups, and what they must give: a plain loop over rows, indices and columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels.h"
#include "lookup.h"
#include "testing.h"
#include "trellis_rows.h"

namespace embpack::testing {

// What the parameters of rows and the levels of codebooks are.
enum class Params { like_weights, finite, any_bytes };

struct LookupCase {
    size_t num_rows = 0, embedding_dim = 0;
    Grid grid{4, true};
    Layout layout = Layout::uniform;
    Params params = Params::like_weights;
    // Of float16 parameters like weights, so many exponents are met. With fewer than eight, as in tables that people
    // have, no scale is below 0, and some parameters are 0.
    uint32_t num_exponents = 8;
    size_t num_codebooks = 0, cluster_bytes = 1;
    size_t trellis_bytes = 0;   // of a trellis-coded row, which no grid tells
    std::vector<uint8_t> packed, codebooks, clusters;

    std::vector<int64_t> indices, offsets;   // with offsets there are as many or one more than bags
    std::vector<float> weights;              // none or one for each index
    bool has_offsets = false, indices_are_64_bits = true, offsets_are_64_bits = true;
    size_t num_bags = 0, bag_size = 0;
    int64_t padding_index = no_padding;
    Pooling pooling = Pooling::sum;

    ValueType type = ValueType::f32;
    size_t gap = 0;   // values between rows of the output, which belong to others

    size_t row_bytes() const {
        return layout == Layout::trellis ? trellis_bytes : packed_row_bytes(embedding_dim, grid, layout);
    }
    TrellisShape trellis() const { return {embedding_dim, trellis_bytes}; }
    size_t param_bytes() const { return grid.f16_params ? 2 : 4; }
    size_t value_bytes() const { return type == ValueType::f32 ? 4 : 2; }
    size_t out_row_bytes() const { return (embedding_dim + gap) * value_bytes(); }
    size_t out_bytes(size_t rows) const { return rows ? rows * out_row_bytes() - gap * value_bytes() : 0; }
    size_t start(size_t bag) const {
        if (!has_offsets) return bag * bag_size;
        return bag < offsets.size() ? static_cast<size_t>(offsets[bag]) : indices.size();
    }
    std::string describe() const {
        const char* layouts[] = {"uniform", "codebook", "clustered", "trellis"};
        const char* poolings[] = {"sum", "mean", "max"};
        const char* types[] = {"float32", "float16", "bfloat16"};
        std::string text = std::to_string(num_rows) + " x " + std::to_string(embedding_dim) + ", ";
        text += std::to_string(grid.bits) + " bits, " + layouts[static_cast<int>(layout)];
        if (layout == Layout::trellis) text += " in " + std::to_string(trellis_bytes) + " bytes";
        text += grid.f16_params ? ", float16" : ", float32";
        if (num_exponents < 8) text += " (" + std::to_string(num_exponents) + " exponents)";
        text += " parameters, " + std::to_string(num_codebooks) + " codebooks, " + std::to_string(indices.size());
        text += indices_are_64_bits ? " int64" : " int32";
        text += " indices, " + std::to_string(num_bags) + " bags ";
        text += has_offsets ? offsets_are_64_bits ? "by int64 offsets" : "by int32 offsets"
                            : "of " + std::to_string(bag_size);
        text += std::string(", ") + poolings[static_cast<int>(pooling)] + (weights.empty() ? "" : " with weights");
        if (padding_index != no_padding) text += ", padding " + std::to_string(padding_index);
        return text + ", to " + types[static_cast<int>(type)];
    }
};

// A parameter as it is stored; those that are no number are for Params::any_bytes alone.
inline void put_param(uint8_t* to, bool is_f16, Params params, Random& random, uint32_t num_exponents = 8) {
    uint32_t bits = random.bits();
    if (is_f16) {
        uint16_t half = static_cast<uint16_t>(bits);
        if (params == Params::like_weights)
            half = static_cast<uint16_t>((half & 0x83ff) | (8 + (bits >> 16) % num_exponents) << 10);
        if (params == Params::like_weights && num_exponents < 8 && bits >> 24 < 8) half = 0;
        if (params == Params::finite && (half & 0x7c00) == 0x7c00) half ^= 0x4000;
        std::memcpy(to, &half, 2);
    } else {
        if (params == Params::like_weights) {
            const float value = random.normal();
            std::memcpy(&bits, &value, 4);
        }
        if (params == Params::finite && (bits & 0x7f800000u) == 0x7f800000u) bits ^= 0x40000000u;
        std::memcpy(to, &bits, 4);
    }
}

// Fills in the bytes of a table whose shape is given.
inline void make_table(LookupCase& c, Random& random) {
    const size_t row_bytes = c.row_bytes(), param_bytes = c.param_bytes();
    c.packed.resize(c.num_rows * row_bytes);
    for (uint8_t& byte : c.packed) byte = static_cast<uint8_t>(random.bits() >> 24);
    if (c.layout == Layout::trellis) {
        c.codebooks.resize(sizeof(float) * c.trellis().num_shared());
        for (size_t at = 0; at < c.codebooks.size(); at += sizeof(float))
            put_param(c.codebooks.data() + at, false, c.params, random);
        return;
    }
    const size_t code_bytes = (c.embedding_dim * static_cast<size_t>(c.grid.bits) + 7) / 8;
    for (size_t row = 0; row < c.num_rows; row++)
        for (size_t at = code_bytes; at < row_bytes; at += param_bytes) {
            uint8_t* const param = c.packed.data() + row * row_bytes + at;
            put_param(param, c.grid.f16_params, c.params, random, c.num_exponents);
            if (c.num_exponents < 8 && c.layout == Layout::uniform && at == code_bytes) param[1] &= 0x7f;
        }
    if (c.layout != Layout::clustered) return;
    c.codebooks.resize((c.num_codebooks << c.grid.bits) * param_bytes);
    for (size_t at = 0; at < c.codebooks.size(); at += param_bytes)
        put_param(c.codebooks.data() + at, c.grid.f16_params, c.params, random);
    for (size_t row = 0; row < c.num_rows; row++) {
        const size_t cluster = random.bits() % c.num_codebooks;
        for (size_t byte = 0; byte < c.cluster_bytes; byte++)
            c.clusters.push_back(static_cast<uint8_t>(cluster >> 8 * byte));
    }
}

// Indices of the table, the last row among them.
inline void make_indices(LookupCase& c, size_t count, Random& random) {
    c.indices.clear();
    for (size_t i = 0; i < count; i++) c.indices.push_back(static_cast<int64_t>(random.bits() % c.num_rows));
    if (count > 0) c.indices[random.bits() % count] = static_cast<int64_t>(c.num_rows) - 1;
}

inline void make_weights(LookupCase& c, Random& random) {
    c.weights.clear();
    for (size_t i = 0; i < c.indices.size(); i++) c.weights.push_back(random.normal());
}

// Bags of these sizes, one after the other.
inline void make_offsets(LookupCase& c, const std::vector<size_t>& sizes, bool with_last) {
    c.has_offsets = true;
    c.num_bags = sizes.size();
    c.offsets.assign(1, 0);
    for (size_t size : sizes) c.offsets.push_back(c.offsets.back() + static_cast<int64_t>(size));
    if (!with_last) c.offsets.pop_back();
}

inline float read_param(const uint8_t* from, bool is_f16) {
    float value;
    std::memcpy(&value, from, is_f16 ? 2 : 4);
    if (!is_f16) return value;
    uint16_t half;
    std::memcpy(&half, from, 2);
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float magnitude = std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction), std::max(exponent, 1) - 25);
    if (exponent == 31) magnitude = fraction ? std::nanf("") : std::numeric_limits<float>::infinity();
    return half & 0x8000 ? -magnitude : magnitude;
}

// Nearest, ties to even, by arithmetic that is exact in double; finite values beyond the largest become that.
inline uint16_t narrow(float value, ValueType type) {
    const int fraction_bits = type == ValueType::f16 ? 10 : 7, bias = type == ValueType::f16 ? 15 : 127;
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0, infinity = (2 * bias + 1u) << fraction_bits;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | 1u << (fraction_bits - 1));
    if (value == 0.0f) return static_cast<uint16_t>(sign);
    if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
    const int exponent = std::max(std::ilogb(value), 1 - bias);
    const double units = std::nearbyint(std::ldexp(std::fabs(double{value}), fraction_bits - exponent));
    const uint32_t bits = (static_cast<uint32_t>(exponent + bias - 1) << fraction_bits) + static_cast<uint32_t>(units);
    return static_cast<uint16_t>(sign | std::min(bits, infinity - 1));
}

// A fault of this row at this position, if there is one.
inline bool has_fault(const LookupCase& c, size_t position, int64_t row, LookupFault& fault) {
    if (row < 0 || row >= static_cast<int64_t>(c.num_rows)) {
        fault.note(position, LookupFault::outside);
        return true;
    }
    if (c.layout != Layout::clustered) return false;
    const uint8_t* cluster = c.clusters.data() + static_cast<size_t>(row) * c.cluster_bytes;
    if (cluster[0] + (c.cluster_bytes == 2 ? 256u * cluster[1] : 0u) < c.num_codebooks) return false;
    fault.note(position, LookupFault::no_codebook);
    return true;
}

// Bit by bit, in the order of the path.
inline std::vector<float> decode_trellis_row(const LookupCase& c, size_t row) {
    const TrellisShape shape = c.trellis();
    const uint8_t* bytes = c.packed.data() + row * c.trellis_bytes;
    const size_t d = c.embedding_dim;
    const auto bit = [&](size_t at) -> size_t { return bytes[at / 8] >> at % 8 & 1; };
    const auto shared = [&](size_t i) { return read_param(c.codebooks.data() + sizeof(float) * i, false); };
    const auto level = [&](size_t i) {
        uint32_t bits;
        std::memcpy(&bits, c.codebooks.data() + sizeof bits * i, sizeof bits);
        if (shape.narrow_bits <= 5) bits &= 0xffff0000;   // bfloat16
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    };
    const float scale = shared(shape.first_scale() + bytes[c.trellis_bytes - 1]);
    std::vector<float> levels(d);
    size_t before[5], top_bit = d * shape.narrow_bits;
    for (size_t i = 0; i < 5; i++) before[i] = bytes[c.trellis_bytes - 1] >> (7 - i) & 1;
    for (size_t start = 0; start < d; start += 64) {
        const size_t count = std::min<size_t>(64, d - start);
        const size_t num_wide = (start + count) * shape.num_wide / d - start * shape.num_wide / d;
        size_t step = start * shape.narrow_bits;
        for (size_t i = 0; i < 16; i++)
            for (size_t j = i; j < count; j += 16) {
                const size_t first = j - i, lanes = std::min<size_t>(16, count - first);
                const size_t wide = std::min(lanes, num_wide - std::min(num_wide, first));
                const bool is_wide = (i + 1) * wide / lanes > i * wide / lanes;
                const size_t message = bit(step);
                size_t number = 2 * (message ^ before[1] ^ before[4]) + before[2];
                for (size_t k = 1; k < shape.narrow_bits; k++) number += bit(step + k * count) << (k + 1);
                if (is_wide) number += bit(top_bit++) << (shape.narrow_bits + 1);
                const size_t half = shape.num_narrow_levels() / (is_wide ? 1 : 2);
                const size_t upper = is_wide ? half / 2 : 0;
                const bool is_lower = number < half;
                const float size = level(upper + (is_lower ? half - 1 - number : number - half));
                levels[start + j] = std::fma(scale, is_lower ? -size : size, shared(shape.first_mean() + start + j));
                for (size_t k = 4; k > 0; k--) before[k] = before[k - 1];
                before[0] = message;
                step++;
            }
    }
    return levels;
}

inline std::vector<float> decode_row(const LookupCase& c, size_t row) {
    if (c.layout == Layout::trellis) return decode_trellis_row(c, row);
    const uint8_t* codes = c.packed.data() + row * c.row_bytes();
    const uint8_t* params = codes + (c.embedding_dim * static_cast<size_t>(c.grid.bits) + 7) / 8;
    if (c.layout == Layout::clustered) {
        const uint8_t* cluster = c.clusters.data() + row * c.cluster_bytes;
        const size_t number = cluster[0] + (c.cluster_bytes == 2 ? 256u * cluster[1] : 0u);
        params = c.codebooks.data() + (number << c.grid.bits) * c.param_bytes();
    }
    const auto param = [&](size_t i) { return read_param(params + i * c.param_bytes(), c.grid.f16_params); };
    std::vector<float> levels;
    for (size_t j = 0; j < c.embedding_dim; j++) {
        const size_t first_bit = j * static_cast<size_t>(c.grid.bits);
        const unsigned code = codes[first_bit / 8] >> first_bit % 8 & ((1u << c.grid.bits) - 1);
        if (c.layout == Layout::uniform)
            levels.push_back(std::fma(param(0), static_cast<float>(code), param(1)));
        else
            levels.push_back(param(code));
    }
    return levels;
}

// The rows of an output. With a fault they are empty, for they may be anything.
struct Answer {
    std::vector<std::vector<float>> rows;
    LookupFault fault;

    void forget_values_at_fault() {
        if (fault.kind != LookupFault::none)
            for (std::vector<float>& row : rows) row.clear();
    }
};

inline Answer gather_plainly(const LookupCase& c, bool by_indices) {
    Answer answer;
    const size_t count = by_indices ? c.indices.size() : c.num_rows;
    for (size_t i = 0; i < count; i++) {
        const int64_t row = by_indices ? c.indices[i] : static_cast<int64_t>(i);
        const bool is_faulty = has_fault(c, i, row, answer.fault);
        answer.rows.push_back(is_faulty ? std::vector<float>() : decode_row(c, static_cast<size_t>(row)));
    }
    answer.forget_values_at_fault();
    return answer;
}

inline Answer pool_plainly(const LookupCase& c) {
    Answer answer;
    for (size_t bag = 0; bag < c.num_bags; bag++) {
        const bool keeps_largest = c.pooling == Pooling::max;
        std::vector<float> sums(c.embedding_dim, keeps_largest ? -std::numeric_limits<float>::infinity() : 0.0f);
        size_t count = 0;
        for (size_t i = c.start(bag); i < c.start(bag + 1); i++) {
            if (c.padding_index != no_padding && c.indices[i] == c.padding_index) continue;
            if (has_fault(c, i, c.indices[i], answer.fault)) continue;
            const std::vector<float> levels = decode_row(c, static_cast<size_t>(c.indices[i]));
            for (size_t j = 0; j < c.embedding_dim; j++) {
                if (keeps_largest)
                    sums[j] = levels[j] > sums[j] ? levels[j] : sums[j];
                else
                    sums[j] = c.weights.empty() ? sums[j] + levels[j] : std::fma(c.weights[i], levels[j], sums[j]);
            }
            count++;
        }
        for (float& sum : sums) {
            if (count == 0) sum = 0.0f;
            if (count != 0 && c.pooling == Pooling::mean) sum /= static_cast<float>(count);
        }
        answer.rows.push_back(sums);
    }
    answer.forget_values_at_fault();
    return answer;
}

struct LookupArenas {
    Arena packed, codebooks, clusters, indices, offsets, weights, out;
};

// int32 or int64, as a case says.
class IntegerBuffer {
public:
    IntegerBuffer(const std::vector<int64_t>& values, bool are_64_bits, Placement placement, Arena& arena)
        : wide_(are_64_bits ? values : std::vector<int64_t>(), placement, arena),
          narrow_(are_64_bits ? std::vector<int32_t>() : std::vector<int32_t>(values.begin(), values.end()), placement,
                  arena),
          view_{are_64_bits ? static_cast<void*>(wide_.get()) : narrow_.get(), values.size(), are_64_bits} {}

    const Integers& view() const { return view_; }

private:
    Buffer<int64_t> wide_;
    Buffer<int32_t> narrow_;
    Integers view_;
};

// A case in memory of its own, and room for what it gives.
class PlacedCase {
public:
    PlacedCase(const LookupCase& c, Placement placement, LookupArenas& arenas)
        : c_(c),
          packed_(c.packed, placement, arenas.packed),
          codebooks_(c.codebooks, placement, arenas.codebooks),
          clusters_(c.clusters, placement, arenas.clusters),
          indices_(c.indices, c.indices_are_64_bits, placement, arenas.indices),
          offsets_(c.offsets, c.offsets_are_64_bits, placement, arenas.offsets),
          weights_(c.weights, placement, arenas.weights),
          placement_(placement),
          arena_(arenas.out) {}

    PackedRows rows() {
        PackedRows rows{packed_.get(), c_.num_rows, c_.embedding_dim, c_.row_bytes(), c_.grid, c_.layout};
        if (c_.layout != Layout::clustered && c_.layout != Layout::trellis) return rows;
        rows.codebooks = codebooks_.get();
        if (c_.layout == Layout::trellis) return rows;
        rows.clusters = clusters_.get();
        rows.cluster_bytes = c_.cluster_bytes;
        rows.num_codebooks = c_.num_codebooks;
        return rows;
    }
    const Integers& indices() const { return indices_.view(); }
    Bags bags(bool prefetches = false) {
        Bags bags;
        bags.prefetches = prefetches;
        bags.indices = indices();
        if (!c_.weights.empty()) bags.per_sample_weights = weights_.get();
        if (c_.has_offsets) bags.offsets = offsets_.view();
        bags.bag_size = c_.bag_size;
        bags.num_bags = c_.num_bags;
        bags.padding_index = c_.padding_index;
        bags.pooling = c_.pooling;
        return bags;
    }
    // Room for rows, between which every byte is untouched: 0xa5.
    Output make_output(size_t num_rows) {
        out_ = std::make_unique<Buffer<uint8_t>>(std::vector<uint8_t>(c_.out_bytes(num_rows), untouched), placement_,
                                                 arena_);
        return {out_->get(), c_.out_row_bytes(), c_.type};
    }
    std::vector<uint8_t> output() const { return out_->copy(); }

    static constexpr uint8_t untouched = 0xa5;

private:
    const LookupCase& c_;
    Buffer<uint8_t> packed_, codebooks_, clusters_;
    IntegerBuffer indices_, offsets_;
    Buffer<float> weights_;
    Placement placement_;
    Arena& arena_;
    std::unique_ptr<Buffer<uint8_t>> out_;
};

// Whether two stored values are the same, all values that are no number being so.
inline bool same_value(const uint8_t* a, const uint8_t* b, ValueType type) {
    if (type == ValueType::f32) {
        float x, y;
        std::memcpy(&x, a, 4);
        std::memcpy(&y, b, 4);
        return std::memcmp(a, b, 4) == 0 || (std::isnan(x) && std::isnan(y));
    }
    uint16_t x, y;
    std::memcpy(&x, a, 2);
    std::memcpy(&y, b, 2);
    const int infinity = type == ValueType::f16 ? 0x7c00 : 0x7f80;
    return x == y || ((x & 0x7fff) > infinity && (y & 0x7fff) > infinity);
}

// Checks an output, and that nothing between its rows has been written to.
inline void check_answer(const LookupCase& c, const std::vector<uint8_t>& got, const LookupFault& fault,
                         const Answer& wanted) {
    CHECK(fault.kind == wanted.fault.kind && fault.position == wanted.fault.position);
    const size_t value_bytes = c.value_bytes();
    bool values_agree = true, gaps_untouched = true;
    for (size_t row = 0; row < wanted.rows.size(); row++) {
        const uint8_t* values = got.data() + row * c.out_row_bytes();
        for (size_t j = 0; j < wanted.rows[row].size(); j++) {
            uint8_t value[4];
            std::memcpy(value, &wanted.rows[row][j], 4);
            if (c.type != ValueType::f32) {
                const uint16_t narrowed = narrow(wanted.rows[row][j], c.type);
                std::memcpy(value, &narrowed, 2);
            }
            values_agree &= same_value(values + j * value_bytes, value, c.type);
        }
        if (row + 1 == wanted.rows.size()) break;
        for (size_t at = c.embedding_dim * value_bytes; at < c.out_row_bytes(); at++)
            gaps_untouched &= values[at] == PlacedCase::untouched;
    }
    CHECK(values_agree);
    CHECK(gaps_untouched);
}

// Bit for bit what another instruction set gave, except at a fault, and that there may be several bits for what
// is no number if there was such a thing in the table.
inline void compare_outputs(const LookupCase& c, const std::vector<uint8_t>& got, const std::vector<uint8_t>& other,
                            const Answer& wanted) {
    bool agree = got.size() == other.size();
    for (size_t row = 0; agree && row < wanted.rows.size(); row++) {
        const size_t at = row * c.out_row_bytes(), values = wanted.rows[row].size(), value_bytes = c.value_bytes();
        if (c.params != Params::any_bytes) {
            agree = std::memcmp(got.data() + at, other.data() + at, values * value_bytes) == 0;
            continue;
        }
        for (size_t j = 0; j < values; j++)
            agree &= same_value(got.data() + at + j * value_bytes, other.data() + at + j * value_bytes, c.type);
    }
    CHECK(agree);
}

// Tables that are gathered as a whole, too; plain loops over more would be slow.
inline constexpr size_t most_rows_at_once = 1000;

// Each kernel against the plain loop and against the portable one, in one call without prefetching and in two with it.
inline void check_case(const LookupCase& c, const std::vector<const Kernels*>& isas, LookupArenas& arenas,
                       const std::string& name = "") {
    const Answer all = c.num_rows > most_rows_at_once ? Answer() : gather_plainly(c, false);
    const Answer some = gather_plainly(c, true), pooled = pool_plainly(c);
    std::vector<uint8_t> portable[3];
    for (const Kernels* k : isas) {
        for (Placement placement : placements) {
            // Plain C++ is seen by the sanitizer: no need for guard pages.
            if (k == isas.front() && placement != Placement::heap) continue;
            PlacedCase placed(c, placement, arenas);
            const auto check = [&](size_t which, const char* what, const Answer& wanted, auto run) {
                const size_t count = wanted.rows.size();
                for (size_t middle : {count, count / 3}) {
                    where = (name.empty() ? "" : name + ", ") + what + ", " + k->isa + ", " + c.describe() + ", " +
                            name_of(placement);
                    const Output out = placed.make_output(count);
                    LookupFault fault;
                    run(middle < count, size_t{0}, middle, out, fault);
                    if (middle < count) run(true, middle, count, out, fault);
                    check_answer(c, placed.output(), fault, wanted);
                    if (portable[which].empty()) portable[which] = placed.output();
                    compare_outputs(c, placed.output(), portable[which], wanted);
                }
            };
            const PackedRows rows = placed.rows();
            const auto gather_by = [&](const Integers& indices) {
                return [&](bool prefetches, size_t first, size_t end, const Output& out, LookupFault& fault) {
                    k->lookups_of(rows).gather_rows(rows, indices, prefetches, first, end, out, fault);
                };
            };
            const Integers none;
            if (!all.rows.empty()) check(0, "gather all", all, gather_by(none));
            if (!c.indices.empty()) check(1, "gather", some, gather_by(placed.indices()));
            check(2, "pool", pooled,
                  [&](bool prefetches, size_t first, size_t end, const Output& out, LookupFault& fault) {
                      pool_bags(*k, {rows, placed.bags(prefetches), out}, first, end, fault);
                  });
        }
    }
}

}  // namespace embpack::testing
