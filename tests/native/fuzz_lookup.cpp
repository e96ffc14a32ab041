// Random lookups, each instruction set that this CPU runs against a plain loop and against the others. Built with the
// address and undefined-behaviour sanitizers.
//
//     fuzz_lookup [lookups [first seed]]
//
// The same seeds always make the same lookups; a message names the seed of the one that failed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "dispatch.h"
#include "lookup.h"
#include "lookup_case.h"
#include "testing.h"
#include "threads.h"

namespace {

using namespace embpack;
using namespace embpack::testing;

class Chooser {
public:
    explicit Chooser(uint64_t seed) : random_(seed * 0x9e3779b97f4a7c15u) {}

    size_t below(size_t end) { return random_.bits() % end; }
    size_t between(size_t first, size_t last) { return first + below(last - first + 1); }
    bool one_in(size_t n) { return below(n) == 0; }
    template <class T, size_t count>
    T among(const T (&choices)[count]) {
        return choices[below(count)];
    }
    Random& random() { return random_; }

private:
    Random random_;
};

LookupCase choose_table(Chooser& choose) {
    LookupCase c;
    const int bits[] = {2, 4, 8};
    const Layout layouts[] = {Layout::uniform, Layout::codebook, Layout::clustered, Layout::trellis};
    const Params params[] = {Params::like_weights, Params::like_weights, Params::finite, Params::any_bytes};
    c.grid = {choose.among(bits), choose.one_in(2)};
    c.layout = choose.among(layouts);
    c.params = choose.among(params);
    c.num_exponents = static_cast<uint32_t>(choose.between(1, 8));
    c.embedding_dim = choose.one_in(6) ? choose.between(1, 600) : choose.between(1, 70);
    if (c.layout == Layout::trellis) {
        c.embedding_dim += trellis_least_dim;
        const size_t eighths = choose.between(8 * trellis_least_bits, 8 * trellis_most_bits + 4);   // of bits a value
        c.trellis_bytes = (c.embedding_dim * eighths + 63) / 64 + 1;
    }
    c.num_rows = choose.between(1, 40);
    if (choose.one_in(24)) c.num_rows = (size_t{1} << 19) / c.row_bytes() + choose.below(3);
    c.num_codebooks = c.layout == Layout::clustered ? choose.between(1, 5) : 0;
    c.cluster_bytes = choose.between(1, 2);
    make_table(c, choose.random());
    if (c.layout == Layout::clustered && choose.one_in(4))
        for (size_t i = choose.between(1, 3); i > 0; i--)
            c.clusters[choose.below(c.clusters.size())] = static_cast<uint8_t>(choose.below(256));
    return c;
}

void choose_bags(LookupCase& c, Chooser& choose) {
    c.has_offsets = choose.one_in(2);
    if (c.has_offsets) {
        std::vector<size_t> sizes;
        const size_t largest[] = {1, 5, 20, 70, 200};
        const size_t up_to = choose.among(largest);
        size_t total = 0;
        for (size_t bag = choose.below(20); bag > 0 && total < 600; bag--) {
            sizes.push_back(choose.one_in(4) ? 0 : choose.between(0, up_to));
            total += sizes.back();
        }
        const bool with_last = choose.one_in(2);
        make_offsets(c, sizes, with_last);
        // With a last offset, there may be indices after it.
        make_indices(c, total + (with_last && choose.one_in(4) ? choose.below(9) : 0), choose.random());
    } else {
        c.bag_size = choose.one_in(4) ? choose.between(0, 600) : choose.between(0, 8);
        c.num_bags = choose.below(600 / (c.bag_size + 1) + 1);
        make_indices(c, c.bag_size * c.num_bags, choose.random());
    }
}

void choose_faults(LookupCase& c, Chooser& choose) {
    if (c.indices.empty() || !choose.one_in(4)) return;
    const auto rows = static_cast<int64_t>(c.num_rows);
    const int64_t bad_64[] = {-1, -2, rows, rows + 1, INT64_MIN, INT64_MAX, int64_t{1} << 32, INT64_MIN / 36};
    const int64_t bad_32[] = {-1, -2, rows, rows + 1, INT32_MIN, INT32_MAX, 1 << 30};
    for (size_t i = choose.between(1, 3); i > 0; i--)
        c.indices[choose.below(c.indices.size())] = c.indices_are_64_bits ? choose.among(bad_64) : choose.among(bad_32);
}

LookupCase choose_case(uint64_t seed) {
    Chooser choose(seed);
    LookupCase c = choose_table(choose);
    choose_bags(c, choose);
    const Pooling poolings[] = {Pooling::sum, Pooling::mean, Pooling::max};
    const ValueType types[] = {ValueType::f32, ValueType::f16, ValueType::bf16};
    c.pooling = choose.among(poolings);
    c.type = choose.among(types);
    c.gap = choose.one_in(2) ? choose.below(5) : 0;
    c.indices_are_64_bits = choose.one_in(2);
    c.offsets_are_64_bits = choose.one_in(2);
    if (choose.one_in(3)) make_weights(c, choose.random());
    choose_faults(c, choose);
    if (choose.one_in(3)) c.padding_index = c.indices.empty() ? 0 : c.indices[choose.below(c.indices.size())];
    if (c.padding_index < 0) c.padding_index = no_padding;
    return c;
}

// What bindings.cpp calls, for several lookups together and by several threads.
void check_together(const std::vector<LookupCase>& cases, LookupArenas& arenas) {
    std::vector<Answer> wanted;
    size_t wanted_faulty = cases.size();
    for (size_t i = 0; i < cases.size(); i++) {
        wanted.push_back(pool_plainly(cases[i]));
        if (wanted[i].fault.kind != LookupFault::none && wanted_faulty == cases.size()) wanted_faulty = i;
    }
    const Answer gathered = gather_plainly(cases[0], true);
    const std::string group = where;
    for (std::string_view isa : available_isas()) {
        CHECK(use_isa(isa));
        for (int threads : {1, 2, 3}) {
            where = group + ", " + std::string(isa) + ", " + std::to_string(threads) + " threads";
            set_num_threads(threads);
            std::vector<PlacedCase> placed;
            placed.reserve(cases.size());
            std::vector<Lookup> lookups;
            for (size_t i = 0; i < cases.size(); i++) {
                placed.emplace_back(cases[i], Placement::heap, arenas);
                lookups.push_back({placed[i].rows(), placed[i].bags(), placed[i].make_output(cases[i].num_bags)});
            }
            size_t faulty;
            const LookupFault fault = pool(lookups, faulty);
            CHECK(faulty == wanted_faulty);
            for (size_t i = 0; i < cases.size(); i++) {
                // Of the faults, only the first lookup's is told.
                const bool is_told = i == wanted_faulty || wanted_faulty == cases.size();
                where = group + ", " + cases[i].describe() + ", " + std::string(isa) + ", " + std::to_string(threads) +
                        " threads";
                check_answer(cases[i], placed[i].output(), is_told ? fault : wanted[i].fault, wanted[i]);
            }
            if (cases[0].indices.empty()) continue;
            const Output out = placed[0].make_output(cases[0].indices.size());
            const LookupFault gather_fault = gather(placed[0].rows(), placed[0].indices(), out);
            check_answer(cases[0], placed[0].output(), gather_fault, gathered);
        }
    }
}

// More work than one thread is woken for.
LookupCase choose_large_case(uint64_t seed) {
    LookupCase c = choose_case(seed);
    Chooser choose(~seed);
    std::vector<size_t> sizes;
    size_t total = 0;
    while (total * c.embedding_dim < 60000) {
        sizes.push_back(choose.one_in(3) ? choose.between(0, 150) : choose.between(0, 3));
        total += sizes.back();
    }
    make_offsets(c, sizes, choose.one_in(2));
    make_indices(c, total, choose.random());
    if (!c.weights.empty()) make_weights(c, choose.random());
    choose_faults(c, choose);
    return c;
}

void fuzz(uint64_t seed, const std::vector<const Kernels*>& isas, LookupArenas& arenas) {
    const std::string name = "seed " + std::to_string(seed);
    const LookupCase c = choose_case(seed);
    check_case(c, isas, arenas, name);
    if (seed % 4 != 0) return;
    std::vector<LookupCase> cases;
    for (size_t i = 0; i < 1 + seed / 4 % 3; i++) {
        const uint64_t other = seed + (i << 32);
        cases.push_back(seed % 16 == 0 ? choose_large_case(other) : choose_case(other));
    }
    where = name + ", " + std::to_string(cases.size()) + " together";
    check_together(cases, arenas);
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 300;
    const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    const std::vector<const Kernels*> isas = all_kernels();
    LookupArenas arenas;
    for (uint64_t seed = first; seed - first < count && failures < 20; seed++) fuzz(seed, isas, arenas);
    if (failures == 0) std::printf("%zu instruction sets agree\n", isas.size());
    return failures == 0 ? 0 : 1;
}
