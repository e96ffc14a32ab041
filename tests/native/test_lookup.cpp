// Lookups around every boundary, by the kernels of each instruction set that this CPU runs. Built with the address and
// undefined-behaviour sanitizers.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "lookup_case.h"
#include "testing.h"

namespace {

using namespace embpack;
using namespace embpack::testing;

using Isas = std::vector<const Kernels*>;

constexpr ValueType types[] = {ValueType::f32, ValueType::f16, ValueType::bf16};
constexpr Pooling poolings[] = {Pooling::sum, Pooling::mean, Pooling::max};
constexpr Layout layouts[] = {Layout::uniform, Layout::codebook, Layout::clustered};

// Around the 256 rows that a window has at most, together 1093.
const std::vector<size_t> bag_sizes = {1, 0, 63, 256, 2, 257, 0, 513, 1, 0};
constexpr size_t num_indices = 1093;

LookupCase make_case(size_t num_rows, size_t embedding_dim, Grid grid, Layout layout, Random& random,
                     Params params = Params::like_weights) {
    LookupCase c;
    c.params = params;
    c.num_rows = num_rows;
    c.embedding_dim = embedding_dim;
    c.grid = grid;
    c.layout = layout;
    c.num_codebooks = layout == Layout::clustered ? 3 : 0;
    c.trellis_bytes = layout == Layout::trellis ? (embedding_dim * static_cast<size_t>(grid.bits) + 7) / 8 + 1 : 0;
    make_table(c, random);
    return c;
}

// What changes from case to case, so that each meets each of the others at some width.
void choose(LookupCase& c, size_t number, Random& random) {
    c.type = types[number % 3];
    c.pooling = poolings[number / 3 % 3];
    c.indices_are_64_bits = number % 2 == 0;
    c.offsets_are_64_bits = number / 2 % 2 == 0;
    c.gap = number % 5;
    c.weights.clear();
    if (c.pooling == Pooling::sum && number % 2 == 0) make_weights(c, random);
    c.padding_index = number % 4 == 3 ? c.indices[number % c.indices.size()] : no_padding;
}

// Every width, in all row formats; bags of few rows.
void test_widths(const Isas& isas, LookupArenas& arenas) {
    std::vector<size_t> widths = {63, 64, 65, 79, 80, 127, 128, 129, 255, 256, 257, 272, 511, 513, 1030};
    for (size_t d = 1; d <= 50; d++) widths.push_back(d);
    Random random(1);
    size_t number = 0;
    for (size_t d : widths)
        for (int bits : {2, 4, 8})
            for (bool f16_params : {true, false})
                for (Layout layout : layouts) {
                    LookupCase c = make_case(1 + d % 5, d, {bits, f16_params}, layout, random);
                    make_indices(c, 7, random);
                    choose(c, number++, random);
                    make_offsets(c, {1, 0, 3, 2, 1}, number % 2 == 0);
                    check_case(c, isas, arenas);
                }
}

// Every way to ask, at widths of a few whole and part vectors.
void test_bags(const Isas& isas, LookupArenas& arenas) {
    Random random(2);
    size_t number = 0;
    for (size_t d : {3, 16, 37})
        for (int bits : {2, 4, 8})
            for (Layout layout : layouts) {
                LookupCase c = make_case(9, d, {bits, number % 4 < 2}, layout, random);
                for (size_t way = 0; way < 3; way++) {
                    make_indices(c, num_indices, random);
                    choose(c, number++, random);
                    make_offsets(c, bag_sizes, way == 0);
                    check_case(c, isas, arenas);
                }
                c.has_offsets = false;
                for (size_t bag_size : {0, 1, 31, 256, 257, 550}) {
                    c.bag_size = bag_size;
                    c.num_bags = bag_size == 1 ? 300 : 3;
                    make_indices(c, bag_size * c.num_bags + 1, random);
                    choose(c, number++, random);
                    check_case(c, isas, arenas);
                }
            }
}

// Trellis-coded rows of every width, of few bytes and of many.
void test_trellis(const Isas& isas, LookupArenas& arenas) {
    std::vector<size_t> widths = {63, 64, 65, 79, 96, 100, 127, 128, 129, 255, 256, 257, 272, 384, 511, 1030, 4096};
    for (size_t d = trellis_least_dim; d <= 50; d++) widths.push_back(d);
    Random random(6);
    size_t number = 0;
    for (size_t d : widths)
        for (size_t eighths : {16, 18, 20, 24, 28, 32, 36, 41, 48, 56, 60}) {   // of bits a value
            LookupCase c;
            c.num_rows = 1 + d % 5;
            c.embedding_dim = d;
            c.layout = Layout::trellis;
            c.trellis_bytes = (d * eighths + 63) / 64 + 1;
            make_table(c, random);
            make_indices(c, d > 1000 ? 7 : 600, random);
            choose(c, number++, random);
            if (d > 1000)
                make_offsets(c, {1, 0, 3, 2, 1}, number % 2 == 0);
            else
                make_offsets(c, {1, 0, 330, 19, 250}, number % 2 == 0);
            check_case(c, isas, arenas);
        }
}

// Values that float16 and bfloat16 cannot hold, and those that are no number to begin with.
void test_large_values(const Isas& isas, LookupArenas& arenas) {
    Random random(7);
    size_t number = 0;
    for (Params params : {Params::finite, Params::any_bytes})
        for (size_t d : {9, 16, 64, 130})
            for (Grid grid : {Grid{2, true}, Grid{4, true}, Grid{4, false}, Grid{8, false}})
                for (Layout layout : {Layout::uniform, Layout::codebook, Layout::clustered, Layout::trellis}) {
                    if (layout == Layout::trellis && grid.bits == 8) continue;
                    LookupCase c = make_case(9, d, grid, layout, random, params);
                    make_indices(c, 40, random);
                    for (ValueType type : types) {
                        choose(c, number++, random);
                        c.type = type;
                        make_offsets(c, {1, 0, 3, 2, 34}, number % 2 == 0);
                        check_case(c, isas, arenas);
                    }
                }
}

// A bag that is all padding counts as empty, whatever its size.
void test_only_padding(const Isas& isas, LookupArenas& arenas) {
    Random random(3);
    for (Pooling pooling : poolings)
        for (size_t bag_size : {1, 256, 257, 600}) {
            LookupCase c = make_case(4, 21, {4, true}, Layout::uniform, random);
            c.pooling = pooling;
            c.bag_size = bag_size;
            c.num_bags = 3;
            make_indices(c, 3 * bag_size, random);
            std::fill(c.indices.begin(), c.indices.begin() + static_cast<ptrdiff_t>(2 * bag_size), 2);
            c.padding_index = 2;
            check_case(c, isas, arenas);
        }
}

std::vector<int64_t> faulty_indices(const LookupCase& c) {
    if (c.indices_are_64_bits)
        return {-1, static_cast<int64_t>(c.num_rows), INT64_MIN, INT64_MAX, int64_t{1} << 32};
    return {-1, static_cast<int64_t>(c.num_rows), INT32_MIN, INT32_MAX};
}

// In tables small and large, whose rows are prefetched before their indices are checked, the first fault is told.
void test_outside(const Isas& isas, LookupArenas& arenas) {
    Random random(4);
    for (size_t num_rows : {1, 16000})
        for (bool are_64_bits : {true, false}) {
            LookupCase c = make_case(num_rows, 63, {4, true}, Layout::uniform, random);
            c.indices_are_64_bits = are_64_bits;
            for (int64_t bad : faulty_indices(c))
                for (size_t first_at : {size_t{0}, size_t{1}, size_t{64}, num_indices - 1}) {
                    make_indices(c, num_indices, random);
                    for (size_t at : {first_at, size_t{450}, num_indices - 1})
                        if (at >= first_at) c.indices[at] = bad;
                    c.padding_index = first_at == 64 ? bad : first_at == 1 ? 0 : no_padding;
                    make_offsets(c, bag_sizes, true);
                    check_case(c, isas, arenas);
                }
        }
}

// Large tables of each layout, of short rows and of long ones, without faults.
void test_large_tables(const Isas& isas, LookupArenas& arenas) {
    Random random(5);
    size_t number = 0;
    for (Layout layout : layouts)
        for (int bits : {2, 4, 8})
            for (size_t d : {50, 2500}) {
                const Grid grid{bits, number % 2 == 0};
                const size_t num_rows = (size_t{1} << 19) / packed_row_bytes(d, grid, layout) + 2;
                LookupCase c = make_case(num_rows, d, grid, layout, random);
                make_indices(c, d == 50 ? num_indices : 80, random);
                choose(c, number++, random);
                if (d == 50)
                    make_offsets(c, bag_sizes, number % 2 == 0);
                else
                    make_offsets(c, {3, 66, 11}, number % 2 == 0);
                check_case(c, isas, arenas);
            }
}

// A cluster number beyond the codebooks is a fault of its row, padding or not; the lowest position counts whichever
// fault it is of, and padding before it does not move it.
void test_no_codebook(const Isas& isas, LookupArenas& arenas) {
    Random random(6);
    for (size_t cluster_bytes : {1, 2})
        for (size_t first_at : {0, 1, 63, 200, 579})
            for (bool with_padding : {false, true})
                for (bool with_outside : {false, true}) {
                    LookupCase c;
                    c.num_rows = 6;
                    c.embedding_dim = 19;
                    c.layout = Layout::clustered;
                    c.num_codebooks = 3;
                    c.cluster_bytes = cluster_bytes;
                    make_table(c, random);
                    c.clusters[5 * cluster_bytes] = 3;
                    c.clusters[4 * cluster_bytes + cluster_bytes - 1] = 0xff;
                    make_indices(c, num_indices, random);
                    for (int64_t& index : c.indices) index %= 4;
                    c.indices[first_at] = 4 + static_cast<int64_t>(first_at % 2);
                    c.indices[570] = 5;
                    if (with_outside) c.indices[first_at / 2 + 1] = 6;
                    c.padding_index = !with_padding ? no_padding : first_at == 200 ? 4 : 1;
                    make_offsets(c, bag_sizes, true);
                    check_case(c, isas, arenas);
                }
}

}  // namespace

int main() {
    const Isas isas = all_kernels();
    LookupArenas arenas;
    test_widths(isas, arenas);
    test_bags(isas, arenas);
    test_trellis(isas, arenas);
    test_large_values(isas, arenas);
    test_only_padding(isas, arenas);
    test_outside(isas, arenas);
    test_large_tables(isas, arenas);
    test_no_codebook(isas, arenas);
    if (failures == 0) std::printf("%zu instruction sets agree\n", isas.size());
    return failures == 0 ? 0 : 1;
}
