// What an instruction set provides: structs of function pointers, filled in units/*.cpp.
//
// Kernels know pointers and sizes. They allocate nothing, throw nothing, never read or write past the
// sizes they are given, and trust their caller (bindings_*.cpp) to have checked them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace embpack {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed rows are little-endian, and read where they are");

// Rows are quantized in blocks, so that a search can put one row in each lane of several vectors.
inline constexpr size_t lanes = 16;
inline constexpr size_t block_rows = 32;

// Of a histogram. It lies on the stack.
inline constexpr int max_bins = 1024;

// Starts of a search lie on the stack, too.
inline constexpr int most_kept = 8;

// Of clipped_f16 kernels know alone: float16 in which finite values stay finite.
enum class ValueType : uint8_t { f32, f16, bf16, clipped_f16 };

inline constexpr size_t value_bytes(ValueType type) { return type == ValueType::f32 ? 4 : 2; }

// How a clipping range becomes scale and bias, and how these are stored after a row's codes.
struct Grid {
    int bits;          // 2, 4 or 8
    bool f16_params;   // scale and bias as float16, otherwise float32
};

// A range for each row of a block: its bounds, or what a search has made of them.
struct Ranges {
    float xmin[block_rows];
    float xmax[block_rows];
};

// What a search may need beside the rows; each reads only its own fields.
struct SearchParams {
    int b = 200;                      // greedy: number of steps in the full range; hist-*: of bins, at most max_bins
    double r = 0.16;                  // greedy: the share of the range that may be cut off
    bool local_minima_only = false;   // greedy: remember what PyTorch and the paper's figures remember
    int scale_step = 1;               // optimal: every so many of the scales and offsets are started from
    int quarter_step = 1;
    int num_kept = 5;                 // optimal: starts that it goes on with, at most most_kept
    int num_steps = 6;                // optimal: how often
    bool is_exact = false;            // optimal: whether the range with the least error of all is a start too ...
    const Ranges* exact = nullptr;    // ... which is this one, of the rows of the block
    // optimal: of the squared error of each value, row after row; or of each column, of all rows; or null: all are 1.
    const float* error_weights = nullptr;
    bool are_of_columns = false;
    float xmin = 0.0f;                // table: the range of the whole table
    float xmax = 0.0f;
};

// Up to block_rows rows of embedding_dim float32 values each, contiguous.
struct RowBlock {
    const float* rows;
    size_t num_rows;
    size_t embedding_dim;
};

// Sums over the values of a block: what the normalized l2 loss is made of.
struct SquaredSums {
    double error;
    double norm;
};

// Narrows ranges from the row bounds to what the method chooses. `scratch` holds search_floats(embedding_dim), and is
// aligned as doubles are.
using SearchFn = void (*)(const RowBlock&, Grid, const SearchParams&, Ranges&, float* scratch) noexcept;

// Rows of a block, transposed, and their error weights; or hist-brute's tables, too large for the stack of a thread.
inline constexpr size_t hist_brute_floats = 50 * max_bins;
inline constexpr size_t search_floats(size_t embedding_dim) {
    const size_t columns = 2 * block_rows * embedding_dim;
    return columns > hist_brute_floats ? columns : hist_brute_floats;
}

// What a kernel that may take long asks now and then: whether to leave the rest undone, for nobody wants it any more.
struct Stop {
    bool (*is_wanted)(void* context) noexcept;
    void* context;
    bool operator()() const noexcept { return is_wanted(context); }
};

// Finds a codebook for each row of a block, 2^bits float32 levels that ascend. `room` holds
// kmeans_doubles(embedding_dim, bits).
using CodebookFn = void (*)(const RowBlock&, Grid, float* codebooks, double* room, const Stop& stop) noexcept;

inline constexpr size_t kmeans_doubles(size_t embedding_dim, int bits) {
    const size_t columns = lanes * embedding_dim / 2, prefix_sums = 2 * lanes * (embedding_dim + 1);
    const size_t errors = 2 * lanes * embedding_dim, splits = (size_t{1} << bits) * lanes * embedding_dim / 2;
    return columns + (embedding_dim + 1) + prefix_sums + errors + splits;
}

// The codebooks to encode with, 2^bits levels each.
struct Codebooks {
    const float* values;
    const uint32_t* of_row;   // which codebook a row of the block has; null: row i has codebook i
    bool stored_in_rows;
};

// What follows a row's codes: scale and bias, the row's codebook, or nothing: the codebook is chosen by the row's
// cluster number. A trellis-coded row is another kind (trellis_rows.h); its bytes do not follow from a grid.
enum class Layout : uint8_t { uniform, codebook, clustered, trellis };
inline constexpr size_t num_layouts = 4;

// Bytes of a row's codes, of a codebook, and of a row.
inline constexpr size_t code_bytes(size_t embedding_dim, Grid grid) {
    return (embedding_dim * static_cast<size_t>(grid.bits) + 7) / 8;
}
inline constexpr size_t codebook_bytes(Grid grid) { return (grid.f16_params ? size_t{2} : size_t{4}) << grid.bits; }
inline constexpr size_t packed_row_bytes(size_t embedding_dim, Grid grid, Layout layout = Layout::uniform) {
    size_t params = 0;
    switch (layout) {
        case Layout::uniform: params = 2 * (grid.f16_params ? size_t{2} : size_t{4}); break;
        case Layout::codebook: params = codebook_bytes(grid); break;
        case Layout::clustered: break;
        case Layout::trellis: break;   // bytes that do not follow from a grid
    }
    return code_bytes(embedding_dim, grid) + params;
}

struct PackedRows {
    const uint8_t* bytes;
    size_t num_rows;
    size_t embedding_dim;
    size_t row_bytes;
    Grid grid;
    Layout layout = Layout::uniform;
    // clustered: num_codebooks of 2^bits values of the parameter type; trellis: one, float32, in the order of
    // TrellisShape.
    const uint8_t* codebooks = nullptr;
    const uint8_t* clusters = nullptr;    // clustered: a number for each row, of cluster_bytes
    size_t cluster_bytes = 0;
    size_t num_codebooks = 0;
    bool is_rotated = false;              // values are to be rotated back, which kernels leave to their caller
};

inline size_t cluster_of(const PackedRows& rows, size_t row) {
    const uint8_t* number = rows.clusters + row * rows.cluster_bytes;
    return rows.cluster_bytes == 1 ? number[0] : static_cast<size_t>(number[0] | number[1] << 8);
}
inline bool has_codebook(const PackedRows& rows, size_t row) {
    return rows.layout != Layout::clustered || cluster_of(rows, row) < rows.num_codebooks;
}

// Trellis-coded rows, as src/embpack/layouts/trellis.py specifies them.
inline constexpr size_t trellis_scales = 256, trellis_states = 32, trellis_subsets = 4, most_subset_levels = 64;

// A codebook, dealt out to the subsets. The arrays begin cache lines.
struct TrellisLevels {
    alignas(64) float of_subset[trellis_subsets][most_subset_levels];   // ascending, 2^index_bits of each
    // The largest value that is as near to level k - 1 of a subset as to level k, in float32; -infinity at k = 0.
    alignas(64) float before[trellis_subsets][most_subset_levels];
    float limit = -1.0f;   // up to which magnitude of values `before` tells the nearest level, -1 for none
    int index_bits = 0;
};

struct TrellisTable {
    TrellisLevels narrow, wide;
    const uint16_t* columns = nullptr;   // of each step of a path
    const uint8_t* is_wide = nullptr;    // whether the step's code is
    const float* mean = nullptr;
    size_t row_bytes = 0;
    // The scales that differ, ascending, and of each the states that a path may begin in, and their numbers.
    size_t num_scales = 0;
    float scales[trellis_scales];
    uint32_t starts[trellis_scales];
    uint8_t numbers[trellis_scales][trellis_states];
};

// Floats that encode_trellis works in.
inline constexpr size_t trellis_floats(size_t embedding_dim) { return 5 * lanes * embedding_dim + 2 * lanes; }

enum class Pooling : uint8_t { sum, mean, max };

// int32 or int64; null where there are none.
struct Integers {
    const void* values = nullptr;
    size_t count = 0;
    bool are_64_bits = true;

    int64_t operator[](size_t i) const {
        return are_64_bits ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
    }
};

inline constexpr int64_t no_padding = -1;

// Runs of indices. They start where offsets say, the last one ends with the last offset or the last index; without
// offsets all are of the same size.
struct Bags {
    Integers indices = {};
    const float* per_sample_weights = nullptr;   // of each index, for sums; may be null
    Integers offsets = {};
    size_t bag_size = 0;
    size_t num_bags = 0;
    int64_t padding_index = no_padding;          // its rows are left out
    Pooling pooling = Pooling::sum;
    bool prefetches = false;                     // rows, which are too many for the second-level cache

    size_t start(size_t bag) const {
        if (!offsets.values) return bag * bag_size;
        return bag < offsets.count ? static_cast<size_t>(offsets[bag]) : indices.count;
    }
};

// float32, float16 or bfloat16 values, each row row_bytes after the one before.
struct Output {
    uint8_t* values;
    size_t row_bytes;
    ValueType type = ValueType::f32;
};

// The first index that cannot be looked up.
struct LookupFault {
    enum Kind : uint8_t { none, outside, no_codebook };

    Kind kind = none;
    size_t position = SIZE_MAX;

    void note(size_t at, Kind what) {
        if (at >= position) return;
        position = at;
        kind = what;
    }
};

// Rows first .. end of the output: row indices[i] of the table, or row i where there are no indices. Any index may be
// given; the first that has no row, or whose row has no codebook, is noted as the fault, and all values are then
// anything.
using GatherRowsFn = void (*)(const PackedRows&, const Integers& indices, bool prefetches, size_t first, size_t end,
                              const Output&, LookupFault&) noexcept;

// Rows first .. end of the output: the sums or means of those bags; zeros for a bag without rows.
using PoolBagsFn = void (*)(const PackedRows&, const Bags&, size_t first, size_t end, const Output&,
                            LookupFault&) noexcept;

// Lookups of rows of one or more layouts.
struct Lookups {
    GatherRowsFn gather_rows;
    PoolBagsFn pool_bags;
};

// PRODUCTS of rows with vectors. A row is read by windows of 64 bytes, each of which is sixteen words of 32 bits, one to a
// lane: codes, the first in the lowest bits, or a float32 value. A code is taken from where it lies in its word, so it
// counts 2^(bits * k) times, the k-th from the bottom; the vector's value has been divided by that. The topmost one is
// shifted down, for its word is signed.
inline constexpr size_t window_bytes_of_product = 64;

struct WordRows {
    const uint8_t* bytes;
    size_t num_rows, row_bytes;
    size_t num_windows;   // one after the other, ...
    size_t last_window;   // ... but for the last one, which begins at this byte of a row: it may repeat what has been
    int bits;             // 2, 4 or 8, of codes; 32: values
};

// Vectors in groups of group_vectors, of which the last may be one of 1 or 2: of each window and each k in turn, the
// values of each vector of the group that go with the sixteen lanes, 0 where there is nothing or it has been.
inline constexpr size_t group_vectors = 4;
inline constexpr size_t group_of(size_t num_vectors) {
    return num_vectors > 2 ? group_vectors : num_vectors;
}

// Many vectors are multiplied by unpacked rows, sixteen vectors to a panel: of each column in turn, the value of each.
struct ValueRows {
    const float* values;
    size_t num_rows, stride, num_columns;
};

struct Products {
    // products[stride * v + i]: of row i and vector v, with room for whole groups.
    void (*multiply_words)(const WordRows&, const float* vectors, size_t num_vectors, float* products,
                           size_t stride) noexcept;
    // Adds to sums[16 * i + lane] the products of row i with the vectors of a panel, column by column.
    void (*multiply_panel)(const ValueRows&, const float* panel, float* sums) noexcept;
};

struct TrellisProducts {
    // products[stride * v + i - first]: of vector v and of row i of first .. end, trellis-coded, the row's scale times
    // the sum of its levels times the vector's values. Vectors in groups as above: of each sixteen columns of each
    // block in turn the values of each vector of the group, 0 where there is nothing. Blocks are whole.
    void (*multiply_levels)(const PackedRows&, size_t first, size_t end, const float* vectors, size_t num_vectors,
                            float* products, size_t stride) noexcept;
};

// Centres of rows, sixteen to a panel: minus half the square of each, then of each column in turn the value of each.
// Lanes past the last centre have minus infinity there, and zeros.
struct Centres {
    const float* panels;
    size_t num_panels;
};

// Whose nearest centres are found together, at most.
inline constexpr size_t nearest_rows = 96;

// What packs rows of all layouts, and rotates them.
struct PackingKernels {
    // out[i] = float32(values[i]) for float16 or bfloat16 values.
    void (*widen_values)(const uint16_t* values, size_t count, ValueType type, float* out) noexcept;

    // Minimum and maximum of each row, and the sum of all squares as far as float32 can tell. False if any value of
    // the block is NaN or infinite.
    bool (*bound_rows)(const RowBlock&, Ranges&, double& norm) noexcept;

    SearchFn search_asym;
    SearchFn search_sym;
    SearchFn search_table;
    SearchFn search_greedy;
    SearchFn search_optimal;
    SearchFn search_gss;
    SearchFn search_aciq;
    SearchFn search_hist_apprx;
    SearchFn search_hist_brute;

    // Packs each row, whose bounds are given, under its range to `packed`, row after row. Fills in sums.error, and
    // sums.norm anew where float32 could not tell. Returns a bit for every row whose scale or bias is not finite in
    // the grid's parameter type.
    uint64_t (*encode_rows)(const RowBlock&, Grid, const Ranges& bounds, const Ranges&, uint8_t* packed,
                            SquaredSums&) noexcept;

    CodebookFn search_kmeans;
    CodebookFn search_kmeans_lloyd;

    // The same with the nearest levels of a codebook. Returns a bit for every row whose codebook is not finite in the
    // grid's parameter type.
    uint64_t (*encode_by_codebook)(const RowBlock&, Grid, const Codebooks&, uint8_t* packed, SquaredSums&) noexcept;

    // Encodes rows, the squares of all values and errors summed in double. `scratch` holds trellis_floats(embedding_dim).
    void (*encode_trellis)(const RowBlock&, const TrellisTable&, float* scratch, uint8_t* packed,
                           SquaredSums&) noexcept;

    // The number of the nearest of some centres to each row, of equally near ones the first.
    void (*find_nearest)(const ValueRows&, const Centres&, uint32_t* numbers) noexcept;

    // Rotates rows of float32 values, contiguous, in place, and back.
    void (*rotate_rows)(float* rows, size_t num_rows, size_t embedding_dim) noexcept;
    void (*rotate_rows_back)(float* rows, size_t num_rows, size_t embedding_dim) noexcept;

    // Of each column the largest of `so_far` and of contiguous rows of float32 values; NaN is not larger than anything.
    void (*keep_largest)(const float* rows, size_t num_rows, size_t embedding_dim, float* so_far) noexcept;

    // Brings contiguous rows of float32 values to the output, rounded to its type.
    void (*write_rows)(const float* rows, size_t num_rows, size_t embedding_dim, const Output&) noexcept;
};

// All that an instruction set has.
struct Kernels : PackingKernels {
    const char* isa;
    Lookups lookups[num_layouts];
    Products products;
    TrellisProducts trellis_products;

    const Lookups& lookups_of(const PackedRows& rows) const { return lookups[static_cast<size_t>(rows.layout)]; }
};

}  // namespace embpack
