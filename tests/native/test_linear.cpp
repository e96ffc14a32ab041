// Products with vectors, of every layout around every boundary, by the kernels of each instruction set that this CPU
// runs, against a plain loop. Built with the address and undefined-behaviour sanitizers.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "linear.h"
#include "lookup_case.h"
#include "testing.h"

namespace {

using namespace embpack;
using namespace embpack::testing;

// From the codes in groups of 4, 2 and 1; and in panels of 16.
constexpr size_t counts[] = {1, 2, 3, 4, 7, 8, 9, 16, 17};

struct Vectors {
    std::vector<float> values, bias;
    size_t count;
};

// Sums in double, and how far a sum of float32 may be from them: each of its d products and additions is rounded, by at
// most 2^-24 of the sizes that are added up. A uniform row is taken apart to scale * code and bias, which are larger, a
// trellis-coded row to scale * level and the mean.
void check_products(const LookupCase& c, const Vectors& vectors, const std::vector<float>& found) {
    bool are_close = true;
    for (size_t row = 0; row < c.num_rows; row++) {
        const std::vector<float> values = decode_row(c, row);
        float offset = 0.0f;
        if (c.layout == Layout::uniform)
            offset = read_param(c.packed.data() + (row + 1) * c.row_bytes() - c.param_bytes(), c.grid.f16_params);
        const size_t first_mean = c.layout == Layout::trellis ? c.trellis().first_mean() : 0;
        for (size_t v = 0; v < vectors.count; v++) {
            double sum = vectors.bias.empty() ? 0.0 : double{vectors.bias[row]}, size = std::fabs(sum);
            for (size_t j = 0; j < c.embedding_dim; j++) {
                const double x = vectors.values[v * c.embedding_dim + j];
                if (c.layout == Layout::trellis)
                    offset = read_param(c.codebooks.data() + sizeof(float) * (first_mean + j), false);
                sum += double{values[j]} * x;
                size += (std::fabs(double{values[j]}) + 2.0 * std::fabs(double{offset})) * std::fabs(x);
            }
            const double bound = (static_cast<double>(c.embedding_dim) + 6.0) * 0x1p-24 * size + 1e-35;
            are_close &= std::fabs(double{found[v * c.num_rows + row]} - sum) <= bound;
        }
    }
    CHECK(are_close);
}

void check_case(const LookupCase& c, size_t count, bool has_bias, const std::vector<const Kernels*>& isas,
                LookupArenas& arenas, Random& random) {
    Vectors vectors{{}, {}, count};
    for (size_t i = 0; i < count * c.embedding_dim; i++) vectors.values.push_back(random.normal());
    for (size_t i = 0; has_bias && i < c.num_rows; i++) vectors.bias.push_back(random.normal());
    std::vector<float> portable;
    for (const Kernels* k : isas)
        for (Placement placement : placements) {
            if (k == isas.front() && placement != Placement::heap) continue;
            where = std::string("linear, ") + k->isa + ", " + c.describe() + ", " + std::to_string(count) +
                    " vectors, " + name_of(placement);
            CHECK(use_isa(k->isa));
            PlacedCase placed(c, placement, arenas);
            Buffer<float> in(vectors.values, placement, arenas.weights), bias(vectors.bias, placement, arenas.offsets);
            Buffer<float> out(count * c.num_rows, placement, arenas.out);
            const PackedRows rows = placed.rows();
            const LookupFault fault = linear(rows, {in.get(), count, has_bias ? bias.get() : nullptr}, out.get());
            CHECK(fault.kind == LookupFault::none);
            const std::vector<float> found = out.copy();
            if (portable.empty()) {
                portable = found;
                check_products(c, vectors, found);
            }
            CHECK(same_bits(found, portable));
        }
}

LookupCase make_case(size_t num_rows, size_t embedding_dim, Grid grid, Layout layout, Random& random) {
    LookupCase c;
    c.num_rows = num_rows;
    c.embedding_dim = embedding_dim;
    c.grid = grid;
    c.layout = layout;
    c.num_codebooks = layout == Layout::clustered ? 3 : 0;
    c.trellis_bytes = layout == Layout::trellis ? (embedding_dim * static_cast<size_t>(grid.bits) + 7) / 8 + 3 : 0;
    make_table(c, random);
    return c;
}

// A row of a table has no codebook: it is told, however many vectors there are.
void test_no_codebook(const std::vector<const Kernels*>& isas, LookupArenas& arenas, Random& random) {
    LookupCase c = make_case(300, 40, {4, true}, Layout::clustered, random);
    c.clusters[211] = 9;
    c.clusters[290] = 9;
    for (const Kernels* k : isas)
        for (size_t count : {1, 20}) {
            CHECK(use_isa(k->isa));
            where = std::string("a row without codebook, ") + k->isa;
            PlacedCase placed(c, Placement::heap, arenas);
            const std::vector<float> in(count * 40, 1.0f);
            std::vector<float> out(count * 300);
            const LookupFault fault = linear(placed.rows(), {in.data(), count, nullptr}, out.data());
            CHECK(fault.kind == LookupFault::no_codebook && fault.position == 211);
        }
}

}  // namespace

int main() {
    const std::vector<const Kernels*> isas = all_kernels();
    LookupArenas arenas;
    Random random(1);
    size_t number = 0;
    for (size_t d : {1, 4, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 384, 513, 1030})
        for (Layout layout : {Layout::uniform, Layout::codebook, Layout::clustered, Layout::trellis})
            for (int bits : {2, 4, 8}) {
                if (layout == Layout::trellis && (d < trellis_least_dim || bits == 8)) continue;
                const LookupCase c = make_case(1 + number % 23, d, {bits, number % 3 > 0}, layout, random);
                for (size_t repeat = 0; repeat < 2; repeat++, number++)
                    check_case(c, counts[number % std::size(counts)], number % 2 == 0, isas, arenas, random);
            }
    // Trellis-coded rows of several stripes, some of them more than go through these together.
    for (size_t d : {4128, 4300, 9000}) {
        const LookupCase c = make_case(d < 9000 ? 131 : 3, d, {4, true}, Layout::trellis, random);
        for (size_t repeat = 0; repeat < 4; repeat++, number++)
            check_case(c, counts[number % std::size(counts)], number % 2 == 0, isas, arenas, random);
    }
    test_no_codebook(isas, arenas, random);
    if (failures == 0) std::printf("%zu instruction sets agree\n", isas.size());
    return failures == 0 ? 0 : 1;
}
