// Every kernel of every instruction set that this CPU runs, on memory that ends where the last value does, against
// the portable ones, bit for bit. Built with the address and undefined-behaviour sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "lookup.h"
#include "quantize.h"
#include "testing.h"
#include "threads.h"
#include "trellis.h"

namespace {

using namespace embpack;
using namespace embpack::testing;

struct Case {
    size_t embedding_dim;
    size_t num_rows;
    Grid grid;

    std::string describe(const char* isa, Placement placement) const {
        return std::string(isa) + ", embedding_dim " + std::to_string(embedding_dim) + ", " +
               std::to_string(num_rows) + " rows, " + std::to_string(grid.bits) + " bits, " +
               (grid.f16_params ? "float16" : "float32") + " parameters, " + name_of(placement);
    }
};

// Rows of several kinds, one after the other.
std::vector<float> make_rows(const Case& c) {
    Random random(c.embedding_dim * 64 + c.num_rows);
    std::vector<float> rows;
    for (size_t row = 0; row < c.num_rows; row++) {
        for (size_t j = 0; j < c.embedding_dim; j++) {
            const float x = random.normal();
            const float kinds[] = {x, 0.3f, 1000.0f + 0.01f * x, 1e-4f * x, 0.0f, 5e3f * x, x * x * x, -2.5f};
            rows.push_back(kinds[row % 8]);
        }
    }
    return rows;
}

struct Search {
    const char* name;
    SearchFn Kernels::*search;
    SearchParams params;
};
// Few steps: the walk is the same, and the portable kernels are slow under sanitizers.
const Search searches[] = {
    {"asym", &Kernels::search_asym, {}},
    {"sym", &Kernels::search_sym, {}},
    {"table", &Kernels::search_table, {.xmin = -0.7f, .xmax = 1.1f}},
    {"greedy", &Kernels::search_greedy, {.b = 20, .r = 0.3}},
    {"greedy-paper", &Kernels::search_greedy, {.b = 20, .r = 0.3, .local_minima_only = true}},
    {"optimal", &Kernels::search_optimal, {.scale_step = 7, .quarter_step = 3, .num_kept = 2, .num_steps = 2}},
    {"gss", &Kernels::search_gss, {}},
    {"aciq", &Kernels::search_aciq, {}},
    {"hist-apprx", &Kernels::search_hist_apprx, {.b = 20}},
    {"hist-brute", &Kernels::search_hist_brute, {.b = 20}},
};

CodebookFn Kernels::*const codebook_searches[] = {&Kernels::search_kmeans, &Kernels::search_kmeans_lloyd};

// Everything that the kernels return for a case; comparing two of these compares two instruction sets.
struct Results {
    std::vector<float> bounds;
    std::vector<std::vector<float>> ranges, codebooks, gathered, pooled;
    std::vector<std::vector<uint8_t>> packed, packed_by_codebook;
    std::vector<double> sums;
    std::vector<uint64_t> overflows;
};

std::vector<float> used_ranges(const Ranges& ranges, size_t num_rows) {
    std::vector<float> used(ranges.xmin, ranges.xmin + num_rows);
    used.insert(used.end(), ranges.xmax, ranges.xmax + num_rows);
    return used;
}

struct Arenas {
    Arena rows, scratch, packed, out, indices, weights, codebooks, clusters;
};

void quantize_block(const Kernels& k, const Case& c, Placement placement, Arenas& arenas, Results& results) {
    Buffer<float> rows(make_rows(c), placement, arenas.rows);
    const RowBlock block{rows.get(), c.num_rows, c.embedding_dim};
    Ranges bounds{};
    SquaredSums bound_sums{};
    CHECK(k.bound_rows(block, bounds, bound_sums.norm));
    results.bounds = used_ranges(bounds, c.num_rows);
    for (const Search& search : searches) {
        Ranges ranges = bounds;
        Buffer<float> scratch(search_floats(c.embedding_dim), placement, arenas.scratch);
        (k.*search.search)(block, c.grid, search.params, ranges, scratch.get());
        results.ranges.push_back(used_ranges(ranges, c.num_rows));

        Buffer<uint8_t> packed(c.num_rows * packed_row_bytes(c.embedding_dim, c.grid), placement, arenas.packed);
        SquaredSums sums = bound_sums;
        results.overflows.push_back(k.encode_rows(block, c.grid, bounds, ranges, packed.get(), sums));
        results.packed.push_back(packed.copy());
        results.sums.push_back(sums.error);
        results.sums.push_back(sums.norm);
    }
}

// Clustering is slow under sanitizers: a few widths around whole vectors, and full blocks and one row more than half.
bool has_codebooks(const Case& c) {
    if (c.num_rows != block_rows && c.num_rows != lanes + 1) return c.embedding_dim == 17 && c.grid.bits == 4;
    for (size_t d : {1, 2, 15, 16, 17, 33, 64})
        if (c.embedding_dim == d) return c.grid.bits != 8 || d <= 17;
    return false;
}

void quantize_block_by_codebooks(const Kernels& k, const Case& c, Placement placement, Arenas& arenas,
                                 Results& results) {
    Buffer<float> rows(make_rows(c), placement, arenas.rows);
    const RowBlock block{rows.get(), c.num_rows, c.embedding_dim};
    for (CodebookFn Kernels::*search : codebook_searches) {
        Buffer<float> codebooks(c.num_rows << c.grid.bits, placement, arenas.codebooks);
        std::vector<double> room(kmeans_doubles(c.embedding_dim, c.grid.bits));
        (k.*search)(block, c.grid, codebooks.get(), room.data(), {[](void*) noexcept { return false; }, nullptr});
        results.codebooks.push_back(codebooks.copy());
        std::vector<uint32_t> others;
        for (size_t row = 0; row < c.num_rows; row++) others.push_back(static_cast<uint32_t>((row * 7) % c.num_rows));
        Buffer<uint32_t> clusters(others, placement, arenas.clusters);
        for (bool stored_in_rows : {true, false}) {
            const Layout layout = stored_in_rows ? Layout::codebook : Layout::clustered;
            const size_t row_bytes = packed_row_bytes(c.embedding_dim, c.grid, layout);
            Buffer<uint8_t> packed(c.num_rows * row_bytes, placement, arenas.packed);
            const Codebooks which{codebooks.get(), stored_in_rows ? nullptr : clusters.get(), stored_in_rows};
            SquaredSums sums{};
            results.overflows.push_back(k.encode_by_codebook(block, c.grid, which, packed.get(), sums));
            results.packed_by_codebook.push_back(packed.copy());
            results.sums.push_back(sums.error);
            results.sums.push_back(sums.norm);
        }
    }
}

void look_up(const Kernels& k, const Case& c, Layout layout, Placement placement, Arenas& arenas, Results& results) {
    const size_t row_bytes = packed_row_bytes(c.embedding_dim, c.grid, layout);
    const auto& all_packed = layout == Layout::uniform ? results.packed : results.packed_by_codebook;
    // Of the last search, rows with codebooks and, after them, those of clusters.
    const size_t from_end = layout == Layout::codebook ? 2 : 1;
    Buffer<uint8_t> packed(all_packed[all_packed.size() - from_end], placement, arenas.packed);
    PackedRows rows{packed.get(), c.num_rows, c.embedding_dim, row_bytes, c.grid, layout};
    std::vector<uint8_t> numbers, levels;
    for (size_t row = 0; row < c.num_rows; row++) numbers.push_back(static_cast<uint8_t>((row * 7) % 3));
    const size_t level_bytes = c.grid.f16_params ? 2 : 4;
    for (size_t i = 0; i < 3 * level_bytes << c.grid.bits; i++) levels.push_back(i % 2 ? 0x3c : static_cast<uint8_t>(i));
    Buffer<uint8_t> clusters(numbers, placement, arenas.clusters), codebooks(levels, placement, arenas.codebooks);
    if (layout == Layout::clustered) {
        rows.codebooks = codebooks.get();
        rows.clusters = clusters.get();
        rows.cluster_bytes = 1;
        rows.num_codebooks = 3;
    }
    Random random(c.embedding_dim);
    std::vector<int64_t> some_indices;
    std::vector<float> some_weights;
    for (size_t i = 0; i < c.num_rows + 3; i++) {
        some_indices.push_back(random.bits() % c.num_rows);
        some_weights.push_back(random.normal());
    }
    some_indices.back() = static_cast<int64_t>(c.num_rows - 1);
    Buffer<int64_t> indices(some_indices, placement, arenas.indices);
    Buffer<float> weights(some_weights, placement, arenas.weights);
    const size_t count = some_indices.size();

    LookupFault fault;
    const size_t out_bytes = c.embedding_dim * sizeof(float);
    const auto as_output = [&](Buffer<float>& out) { return Output{reinterpret_cast<uint8_t*>(out.get()), out_bytes}; };
    Buffer<float> all(c.num_rows * c.embedding_dim, placement, arenas.out);
    k.lookups_of(rows).gather_rows(rows, {}, false, 0, c.num_rows, as_output(all), fault);
    results.gathered.push_back(all.copy());
    Buffer<float> some(count * c.embedding_dim, placement, arenas.out);
    k.lookups_of(rows).gather_rows(rows, {indices.get(), count}, false, 0, count, as_output(some), fault);
    results.gathered.push_back(some.copy());

    const auto pool = [&](const float* bag_weights, size_t bag, int64_t padding, Pooling pooling) {
        Buffer<float> out(c.embedding_dim, placement, arenas.out);
        const Bags bags{.indices = {indices.get(), bag}, .per_sample_weights = bag_weights, .offsets = {},
                        .bag_size = bag, .num_bags = 1, .padding_index = padding, .pooling = pooling};
        pool_bags(k, {rows, bags, as_output(out)}, 0, 1, fault);
        results.pooled.push_back(out.copy());
    };
    for (Pooling pooling : {Pooling::sum, Pooling::mean, Pooling::max}) {
        for (size_t bag : {size_t{0}, size_t{1}, count}) pool(nullptr, bag, no_padding, pooling);
        pool(nullptr, count, some_indices[0], pooling);
    }
    pool(weights.get(), count, no_padding, Pooling::sum);
    CHECK(fault.kind == LookupFault::none);
}

Results run(const Kernels& k, const Case& c, Placement placement, Arenas& arenas) {
    where = c.describe(k.isa, placement);
    Results results;
    quantize_block(k, c, placement, arenas, results);
    look_up(k, c, Layout::uniform, placement, arenas, results);
    if (!has_codebooks(c)) return results;
    quantize_block_by_codebooks(k, c, placement, arenas, results);
    for (Layout layout : {Layout::codebook, Layout::clustered}) look_up(k, c, layout, placement, arenas, results);
    return results;
}

void compare(const Results& got, const Results& wanted) {
    CHECK(same_bits(got.bounds, wanted.bounds));
    for (size_t i = 0; i < std::size(searches); i++) {
        const std::string outside = where;
        where += std::string(", ") + searches[i].name;
        CHECK(same_bits(got.ranges[i], wanted.ranges[i]));
        CHECK(same_bits(got.packed[i], wanted.packed[i]));
        CHECK(same_bits(got.sums[2 * i], wanted.sums[2 * i]));
        CHECK(same_bits(got.sums[2 * i + 1], wanted.sums[2 * i + 1]));
        CHECK(got.overflows[i] == 0);
        where = outside;
    }
    CHECK(got.sums.size() == wanted.sums.size());
    for (size_t i = 2 * std::size(searches); i < wanted.sums.size(); i++) CHECK(same_bits(got.sums[i], wanted.sums[i]));
    for (size_t i = 0; i < wanted.codebooks.size(); i++) CHECK(same_bits(got.codebooks[i], wanted.codebooks[i]));
    for (size_t i = 0; i < wanted.packed_by_codebook.size(); i++)
        CHECK(same_bits(got.packed_by_codebook[i], wanted.packed_by_codebook[i]));
    for (size_t i = 0; i < wanted.gathered.size(); i++) CHECK(same_bits(got.gathered[i], wanted.gathered[i]));
    for (size_t i = 0; i < wanted.pooled.size(); i++) CHECK(same_bits(got.pooled[i], wanted.pooled[i]));
}

void test_case(const Case& c, const std::vector<const Kernels*>& isas, Arenas& arenas) {
    const Results wanted = run(*isas.front(), c, Placement::heap, arenas);
    for (const Kernels* k : isas) {
        for (Placement placement : placements) {
            // Plain C++ is seen by the sanitizer: no need for guard pages.
            if (k == isas.front() && placement != Placement::heap) continue;
            compare(run(*k, c, placement, arenas), wanted);
        }
    }
}

// The numbers of rows to try: all of them at a few widths; at the others one of them and the block's boundaries.
std::vector<size_t> row_counts(size_t embedding_dim) {
    std::vector<size_t> counts = {1 + embedding_dim % block_rows, block_rows};
    if (embedding_dim == 1 || embedding_dim == 17 || embedding_dim == 32)
        for (size_t rows = 1; rows < block_rows; rows++) counts.push_back(rows);
    return counts;
}

// Every width up to one past a block of 64, and then those around whole vectors.
std::vector<size_t> embedding_dims() {
    std::vector<size_t> dims = {79, 80, 81, 95, 96, 97, 111, 112, 113, 127, 128, 129, 130, 255, 256, 257, 511, 1030};
    for (size_t d = 1; d <= 65; d++) dims.push_back(d);
    return dims;
}

void test_all_cases(const std::vector<const Kernels*>& isas) {
    Arenas arenas;
    for (size_t d : embedding_dims())
        for (int bits : {2, 4, 8})
            for (bool f16_params : {true, false})
                for (size_t rows : row_counts(d)) test_case({d, rows, {bits, f16_params}}, isas, arenas);
}

void test_widen_values(const std::vector<const Kernels*>& isas) {
    Arenas arenas;
    Random random(1);
    for (size_t count = 0; count <= 130; count++) {
        std::vector<uint16_t> halves;
        for (size_t i = 0; i < count; i++) halves.push_back(static_cast<uint16_t>(random.bits()) & 0xbbff);   // no NaN
        for (ValueType type : {ValueType::f16, ValueType::bf16}) {
            std::vector<float> wanted;
            for (const Kernels* k : isas) {
                for (Placement placement : placements) {
                    where = std::string("widen_values, ") + k->isa + ", " + std::to_string(count);
                    Buffer<uint16_t> from(halves, placement, arenas.rows);
                    Buffer<float> to(count, placement, arenas.out);
                    k->widen_values(from.get(), count, type, to.get());
                    if (wanted.empty()) wanted = to.copy();
                    CHECK(same_bits(to.copy(), wanted));
                }
            }
        }
    }
}

// Rows rotated and back, in place, and brought to outputs of each type; equal by all instruction sets.
void test_rotation(const std::vector<const Kernels*>& isas) {
    Arenas arenas;
    Random random(1);
    for (size_t d : embedding_dims()) {
        std::vector<float> rows;
        for (size_t i = 0; i < 3 * d; i++) rows.push_back(random.normal());
        for (ValueType type : {ValueType::f32, ValueType::f16, ValueType::bf16}) {
            std::vector<float> wanted, wanted_back;
            std::vector<uint8_t> wanted_out;
            for (const Kernels* k : isas) {
                for (Placement placement : placements) {
                    where = std::string("rotation, ") + k->isa + ", " + std::to_string(d);
                    Buffer<float> values(rows, placement, arenas.rows);
                    Buffer<uint8_t> out(3 * d * value_bytes(type), placement, arenas.out);
                    k->rotate_rows(values.get(), 3, d);
                    if (wanted.empty()) wanted = values.copy();
                    CHECK(same_bits(values.copy(), wanted));
                    k->rotate_rows_back(values.get(), 3, d);
                    if (wanted_back.empty()) wanted_back = values.copy();
                    CHECK(same_bits(values.copy(), wanted_back));
                    k->write_rows(values.get(), 3, d, {out.get(), d * value_bytes(type), type});
                    if (wanted_out.empty()) wanted_out = out.copy();
                    CHECK(same_bits(out.copy(), wanted_out));
                }
            }
        }
    }
}

// A value that is not finite is found wherever it is.
void test_not_finite(const std::vector<const Kernels*>& isas) {
    Arenas arenas;
    const float infinity = std::numeric_limits<float>::infinity();
    for (size_t d : {1, 7, 16, 17, 33, 130}) {
        for (size_t num_rows : {1, 16, 17, 32}) {
            const Case c{d, num_rows, {4, true}};
            const std::vector<float> rows = make_rows(c);
            for (size_t at = 0; at < rows.size(); at += rows.size() / 40 + 1) {
                for (float bad : {std::nanf(""), infinity, -infinity}) {
                    Buffer<float> with_bad(rows, Placement::before_a_guard, arenas.rows);
                    with_bad.get()[at] = bad;
                    for (const Kernels* k : isas) {
                        where = c.describe(k->isa, Placement::before_a_guard) + ", value " + std::to_string(at);
                        Ranges unused{};
                        double unused_norm;
                        CHECK(!k->bound_rows({with_bad.get(), num_rows, d}, unused, unused_norm));
                    }
                }
            }
        }
    }
}

// Rows whose scale or bias overflow are reported, each by its bit, and only they.
void test_overflows(const std::vector<const Kernels*>& isas) {
    for (size_t num_rows : {1, 16, 17, 32}) {
        const size_t d = 19;
        std::vector<float> rows(num_rows * d, 1.0f);
        uint64_t wanted = 0;
        for (size_t row = 0; row < num_rows; row += 3) {
            rows[row * d + row % d] = row % 2 == 0 ? -70000.0f : 2e6f;   // bias, scale
            wanted |= uint64_t{1} << row;
        }
        for (const Kernels* k : isas) {
            where = std::string("overflows, ") + k->isa + ", " + std::to_string(num_rows) + " rows";
            const RowBlock block{rows.data(), num_rows, d};
            Ranges ranges{};
            SquaredSums sums{};
            CHECK(k->bound_rows(block, ranges, sums.norm));
            std::vector<uint8_t> packed(num_rows * packed_row_bytes(d, {4, true}));
            CHECK(k->encode_rows(block, {4, true}, ranges, ranges, packed.data(), sums) == wanted);
            packed.resize(num_rows * packed_row_bytes(d, {4, false}));
            CHECK(k->encode_rows(block, {4, false}, ranges, ranges, packed.data(), sums) == 0);
        }
    }
}

// What bindings.cpp calls, over the end of a block and in several threads.
void test_core() {
    for (size_t num_rows : {1, 31, 32, 33, 65, 3000}) {
        const Case c{21, num_rows, {4, true}};
        const std::vector<float> values = make_rows(c);
        const Rows rows{values.data(), ValueType::f32, num_rows, c.embedding_dim};
        const size_t row_bytes = packed_row_bytes(c.embedding_dim, c.grid);
        std::vector<uint8_t> wanted_packed;
        std::vector<float> wanted_sums;
        QuantizeResult wanted;
        for (int threads : {1, 2, 3}) {
            where = "core, " + std::to_string(num_rows) + " rows, " + std::to_string(threads) + " threads";
            set_num_threads(threads);
            std::vector<uint8_t> packed(num_rows * row_bytes);
            const QuantizeResult result = quantize_rows(rows, &Kernels::search_greedy, {.b = 20}, c.grid, 64, packed.data());
            const PackedRows view{packed.data(), num_rows, c.embedding_dim, row_bytes, c.grid};
            std::vector<float> all(values.size()), sums(c.embedding_dim * 2);
            const size_t out_bytes = c.embedding_dim * sizeof(float);
            const auto as_output = [&](std::vector<float>& out) {
                return Output{reinterpret_cast<uint8_t*>(out.data()), out_bytes};
            };
            CHECK(gather(view, {}, as_output(all)).kind == LookupFault::none);
            std::vector<int64_t> indices;
            for (size_t i = 0; i < num_rows; i++) indices.push_back(static_cast<int64_t>(num_rows - 1 - i));
            const int64_t starts[] = {0, 1, static_cast<int64_t>(num_rows)};
            const Bags bags{.indices = {indices.data(), num_rows}, .offsets = {starts, 3}, .num_bags = 2};
            size_t faulty_lookup;
            Lookup lookup{view, bags, as_output(sums)};
            CHECK(pool({&lookup, 1}, faulty_lookup).kind == LookupFault::none);
            const Bounds bounds = bound_table(rows);
            CHECK(result.fault == RowFault::none && bounds.fault == RowFault::none);
            CHECK(bounds.xmin <= values[0] && values[0] <= bounds.xmax);
            if (threads == 1) {
                wanted_packed = packed;
                wanted = result;
                wanted_sums = sums;
                for (size_t j = 0; j < c.embedding_dim; j++)
                    CHECK(sums[j] == all[(num_rows - 1) * c.embedding_dim + j]);
            }
            CHECK(same_bits(packed, wanted_packed) && same_bits(sums, wanted_sums));
            CHECK(result.sums.size() == (num_rows + 63) / 64 && same_bits(result.sums, wanted.sums));
        }
    }
}

// The exact optimum and weighted errors, within exactly sized arrays; the same by every instruction set.
void test_optimal(const std::vector<const Kernels*>& isas) {
    for (size_t d : {1, 2, 17, 33}) {
        for (int kind : {0, 1, 2}) {   // no weights, of columns, of values
            const Case c{d, block_rows + 1, {4, true}};
            const std::vector<float> values = make_rows(c);
            std::vector<float> weights(kind == 1 ? d : values.size());
            Random random(d);
            for (float& weight : weights) weight = std::max(0.0f, random.normal());
            SearchParams params{.scale_step = 7, .quarter_step = 3, .num_kept = 2, .num_steps = 2, .is_exact = true};
            if (kind != 0) params.error_weights = weights.data();
            params.are_of_columns = kind == 1;
            std::vector<uint8_t> wanted;
            for (const Kernels* k : isas) {
                where = std::string(k->isa) + ", optimal, d = " + std::to_string(d);
                use_isa(k->isa);
                std::vector<uint8_t> packed(c.num_rows * packed_row_bytes(d, c.grid));
                const Rows rows{values.data(), ValueType::f32, c.num_rows, d};
                const QuantizeResult result =
                    quantize_rows(rows, &Kernels::search_optimal, params, c.grid, 64, packed.data());
                CHECK(result.fault == RowFault::none);
                if (wanted.empty()) wanted = packed;
                CHECK(same_bits(packed, wanted));
            }
        }
    }
}

// Trellis-coded rows, with levels that boundaries tell apart and with ones that are all the same.
void test_trellis(const std::vector<const Kernels*>& isas) {
    Arenas arenas;
    Arena is_wide_arena, mean_arena;
    for (size_t d : {1, 2, 4, 15, 16, 17, 33, 64, 130}) {
        for (int bits = 4; bits <= 16; bits += bits < 15 ? 2 : 1) {   // a value, in halves; 8 has bytes to spare
            const size_t row_bytes = (static_cast<size_t>(bits) * d / 2 + 7) / 8 + 1;
            for (size_t num_rows : {size_t{1}, lanes - 1, lanes, lanes + 1, block_rows}) {
                for (float width : {1.0f, 0.0f}) {
                    const Case c{d, num_rows, {4, true}};
                    const TrellisSteps steps(d, row_bytes);
                    std::vector<float> narrow, wide, scales{0.0f};
                    const auto make_levels = [&](size_t count, std::vector<float>& levels) {
                        for (size_t k = 0; k < count; k++)
                            levels.push_back(width * (2.0f * static_cast<float>(k) / static_cast<float>(count) - 1.0f));
                    };
                    make_levels(steps.shape.num_narrow_levels(), narrow);
                    make_levels(steps.shape.num_wide_levels(), wide);
                    for (size_t i = 1; i < trellis_scales; i++)   // a third of them different, in no order
                        scales.push_back(0.01f * std::pow(1.2f, static_cast<float>(i * 37 % 85)));
                    Buffer<float> mean(std::vector<float>(d, 0.25f), Placement::before_a_guard, mean_arena);
                    Buffer<uint8_t> is_wide(steps.is_wide, Placement::before_a_guard, is_wide_arena);
                    TrellisTable table = make_trellis_table(steps, narrow.data(), wide.data(), scales.data(), mean.get());
                    table.is_wide = is_wide.get();
                    std::vector<uint8_t> wanted;
                    SquaredSums wanted_sums{};
                    for (const Kernels* k : isas) {
                        for (Placement placement : placements) {
                            // Plain C++ is seen by the sanitizer: no need for guard pages.
                            if (k == isas.front() && placement != Placement::heap) continue;
                            where = c.describe(k->isa, placement) + ", trellis, row_bytes " + std::to_string(row_bytes);
                            Buffer<float> rows(make_rows(c), placement, arenas.rows);
                            Buffer<float> scratch(trellis_floats(d), placement, arenas.scratch);
                            Buffer<uint8_t> packed(num_rows * row_bytes, placement, arenas.packed);
                            SquaredSums sums{};
                            k->encode_trellis({rows.get(), num_rows, d}, table, scratch.get(), packed.get(), sums);
                            if (wanted.empty()) {
                                wanted = packed.copy();
                                wanted_sums = sums;
                            }
                            CHECK(same_bits(packed.copy(), wanted));
                            CHECK(same_bits(sums.error, wanted_sums.error) && same_bits(sums.norm, wanted_sums.norm));
                        }
                    }
                }
            }
        }
    }
}

// Of several faults the one of the lowest row is kept.
void test_first_fault() {
    std::vector<float> values(5000 * 21, 1.0f);
    values[4000 * 21 + 3] = std::nanf("");
    values[777 * 21] = 1e9f;
    for (int threads : {1, 3}) {
        where = "first fault, " + std::to_string(threads) + " threads";
        set_num_threads(threads);
        const Grid grid{4, true};
        std::vector<uint8_t> packed(5000 * packed_row_bytes(21, grid));
        const Rows rows{values.data(), ValueType::f32, 5000, 21};
        const QuantizeResult result = quantize_rows(rows, &Kernels::search_asym, {}, grid, 64, packed.data());
        CHECK(result.fault == RowFault::params_overflow && result.faulty_row == 777);
        const Bounds bounds = bound_table(rows);
        CHECK(bounds.fault == RowFault::not_finite && bounds.faulty_row == 4000);
    }
}

}  // namespace

// Those whose kernels are not all another's, but for lookups of trellis-coded rows, which are not tested here.
std::vector<const Kernels*> with_own_kernels(const std::vector<const Kernels*>& all) {
    std::vector<const Kernels*> own;
    for (const Kernels* k : all) {
        const auto is_same = [k](const Kernels* other) {
            return other->search_greedy == k->search_greedy && other->lookups[0].pool_bags == k->lookups[0].pool_bags;
        };
        if (std::none_of(own.begin(), own.end(), is_same)) own.push_back(k);
    }
    return own;
}

int main() {
    const std::vector<const Kernels*> isas = with_own_kernels(all_kernels());
    CHECK(std::string(isas.front()->isa) == "portable");
    test_all_cases(isas);
    test_widen_values(isas);
    test_rotation(isas);
    test_not_finite(isas);
    test_overflows(isas);
    test_optimal(isas);
    test_trellis(isas);
    for (const Kernels* k : isas) {
        use_isa(k->isa);
        test_core();
        test_first_fault();
    }
    if (failures == 0) std::printf("%zu instruction sets agree\n", isas.size());
    return failures == 0 ? 0 : 1;
}
