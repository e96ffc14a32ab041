// Lookups around every boundary, by the kernels of each instruction set that this CPU runs. Built with the address and
// undefined-behaviour sanitizers.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "exact_units.h"
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

// Rows of 4 bits whose scales are alike, so that sums of bags are exact up to some number of rows: on both sides of that
// number, at every shape of a tile, from tables small and large.
void test_exact_sums(const Isas& isas, LookupArenas& arenas) {
    Random random(8);
    size_t number = 0;
    for (size_t d : {31, 32, 33, 47, 48, 50, 63, 64, 65, 95, 96, 97, 100, 127, 128, 129, 160, 200, 300})
        for (uint32_t num_exponents : {1, 2, 4, 5, 6})
            for (size_t num_rows : {size_t{300}, (size_t{1} << 19) / packed_row_bytes(d, {4, true}) + 2}) {
                LookupCase c;
                c.num_rows = num_rows;
                c.embedding_dim = d;
                c.num_exponents = num_exponents;
                make_table(c, random);
                make_indices(c, num_indices, random);
                choose(c, number++, random);
                c.weights.clear();
                if (number % 2 == 0)
                    make_offsets(c, bag_sizes, number % 4 == 0);
                else
                    make_offsets(c, {20, 1, 2, 3, 0, 120, 50, 4, 5, 90, 31, 64, 255, 256, 0, 192}, number % 4 == 1);
                check_case(c, isas, arenas);
            }
}

// The largest sums that there can be, of the largest codes, in bags of one row less, as many, and one more than are exact.
void test_limits_of_exact_sums(const Isas& isas, LookupArenas& arenas) {
    Random random(10);
    for (uint16_t largest : {0x3bff, 0x07ff, 0x1401, 0x03ff})
        for (uint16_t exponents_below : {0, 1, 2, 3, 4, 5})
            for (uint16_t bias : {uint16_t{0}, largest, static_cast<uint16_t>(largest | 0x8000)})
                for (size_t d : {33, 64, 100}) {
                    LookupCase c;
                    c.num_rows = 2;
                    c.embedding_dim = d;
                    make_table(c, random);
                    std::fill(c.packed.begin(), c.packed.end(), uint8_t{0xff});
                    const uint16_t step = static_cast<uint16_t>(exponents_below << 10);
                    const uint16_t least = largest > step ? static_cast<uint16_t>((largest - step) | 1) : uint16_t{1};
                    for (size_t row = 0; row < 2; row++) {
                        const uint16_t params[2] = {row == 0 ? largest : least, bias};
                        std::memcpy(c.packed.data() + (row + 1) * c.row_bytes() - sizeof params, params, sizeof params);
                    }
                    const uint32_t magnitude = bias & 0x7fff;
                    const ExactUnits units = find_exact_units({(magnitude - 1) << 16 | (least - 1u), magnitude << 16 | largest});
                    for (size_t most : {units.most_rows, size_t{255}})
                        for (size_t num_rows : {most - 1, most, most + 1}) {
                            if (num_rows - 1 > 600) continue;
                            c.indices.assign(num_rows, 0);
                            c.indices[num_rows / 2] = 1;
                            make_offsets(c, {num_rows}, true);
                            check_case(c, isas, arenas);
                        }
                }
}

// Codebooks of sixteen levels, of which an instruction set may look some rows up before it adds any: bags of fewer and
// of more, and tiles of all shapes.
void test_codebooks(const Isas& isas, LookupArenas& arenas) {
    Random random(9);
    size_t number = 0;
    for (size_t d : {5, 15, 16, 17, 31, 32, 33, 47, 48, 50, 63, 64, 65, 96, 100, 112, 128, 150})
        for (Layout layout : {Layout::codebook, Layout::clustered})
            for (bool f16_params : {true, false})
                for (size_t num_rows : {1, 8, 9, 16, 17, 100}) {
                    LookupCase c = make_case(num_rows, d, {4, f16_params}, layout, random);
                    make_indices(c, num_rows, random);
                    choose(c, number++, random);
                    make_offsets(c, {num_rows / 3, 0, num_rows / 2, num_rows - num_rows / 2 - num_rows / 3}, true);
                    check_case(c, isas, arenas);
                }
}

// Trellis-coded rows of every width, of few bytes and of many.
void test_trellis(const Isas& isas, LookupArenas& arenas) {
    std::vector<size_t> widths = {63, 64, 65, 79, 96, 100, 127, 128, 129, 255, 256, 257, 272, 384, 511, 1030, 4096,
                                  4128, 4300, 9000};   // stripe by stripe
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
    test_exact_sums(isas, arenas);
    test_limits_of_exact_sums(isas, arenas);
    test_trellis(isas, arenas);
    test_large_values(isas, arenas);
    test_only_padding(isas, arenas);
    test_outside(isas, arenas);
    test_large_tables(isas, arenas);
    test_codebooks(isas, arenas);
    test_no_codebook(isas, arenas);
    if (failures == 0) std::printf("%zu instruction sets agree\n", isas.size());
    return failures == 0 ? 0 : 1;
}
