#include "layouts.h"

#include <charconv>
#include <cmath>

#include "trellis_rows.h"

namespace embpack {

namespace {

std::string_view cut_off(std::string_view& text) {
    const size_t colon = text.find(':');
    require(colon != text.npos, "a row format must have four parts");
    const std::string_view part = text.substr(0, colon);
    text.remove_prefix(colon + 1);
    return part;
}

template <class Number>
Number parse_number(std::string_view text) {
    Number number{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    require(error == std::errc() && end == text.data() + text.size(), "a row format has something that is no number");
    return number;
}

// Rows that begin with whole codes.
void set_coded(RowFormat& format, std::string_view bits, bool f16_params) {
    format.grid = make_grid(parse_number<int>(bits), f16_params);
    format.row_bytes = packed_row_bytes(format.embedding_dim, format.grid, format.layout);
}

// Bits may have a fraction: a row has the bytes of a uniform one of so many, with float16 parameters.
void set_trellis(RowFormat& format, std::string_view bits, bool f16_params) {
    const double rate = parse_number<double>(bits);
    require(!f16_params, "param_dtype of the trellis layout must be float32");
    require(rate >= double{trellis_least_bits} && rate <= double{trellis_most_bits} &&
                format.embedding_dim >= trellis_least_dim && format.embedding_dim <= trellis_most_dim,
            "a trellis-coded row has 4 to 65536 values, of 2 to 7 bits");
    const double code_bytes = std::ceil(static_cast<double>(format.embedding_dim) * rate / 8 - 1e-6);
    format.grid = {8, false};
    format.row_bytes = static_cast<size_t>(code_bytes) + 2 * sizeof(uint16_t);
}

void use_nothing(PackedRows&, const Beside&) {}

void use_clusters(PackedRows& rows, const Beside& beside) {
    const auto& [clusters, codebooks] = beside;
    require(clusters.entry_bytes <= 2, "clusters must be uint8 or uint16");
    require(clusters.count == rows.num_rows, "clusters must have one number for each row");
    require(codebooks.entry_bytes == codebook_bytes(rows.grid), "codebooks have the wrong size");
    require(codebooks.count > 0 || rows.num_rows == 0, "codebooks are none");
    rows.codebooks = static_cast<const uint8_t*>(codebooks.bytes);
    rows.clusters = static_cast<const uint8_t*>(clusters.bytes);
    rows.cluster_bytes = clusters.entry_bytes;
    rows.num_codebooks = codebooks.count;
}

void use_trellis_values(PackedRows& rows, const Beside& beside) {
    const size_t bytes = sizeof(float) * TrellisShape(rows.embedding_dim, rows.row_bytes).num_shared();
    require(beside.shared.count == 1 && beside.shared.entry_bytes == bytes, "codebooks have the wrong size");
    rows.codebooks = static_cast<const uint8_t*>(beside.shared.bytes);
}

struct LayoutRules {
    std::string_view name;
    bool has_array_by_row, has_shared_array;
    // Fills in what bits and type of parameters say of a row.
    void (*set_bits)(RowFormat&, std::string_view bits, bool f16_params);
    // Checks the arrays beside the rows, and takes them.
    void (*use)(PackedRows&, const Beside&);
};

// In the order of Layout.
constexpr LayoutRules layouts[num_layouts] = {
    {"uniform", false, false, set_coded, use_nothing},
    {"codebook", false, false, set_coded, use_nothing},
    {"clustered", true, true, set_coded, use_clusters},
    {"trellis", false, true, set_trellis, use_trellis_values},
};

const LayoutRules& rules_of(Layout layout) { return layouts[static_cast<size_t>(layout)]; }

Layout parse_layout(std::string_view name) {
    for (size_t i = 0; i < num_layouts; i++)
        if (layouts[i].name == name) return static_cast<Layout>(i);
    throw std::invalid_argument("layout must be uniform, codebook, clustered or trellis");
}

}  // namespace

Grid make_grid(int bits, bool f16_params) {
    require(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8");
    return {bits, f16_params};
}

RowFormat parse_row_format(std::string_view text) {
    RowFormat format{};
    format.layout = parse_layout(cut_off(text));
    format.embedding_dim = parse_number<size_t>(cut_off(text));
    require(format.embedding_dim > 0 && format.embedding_dim < size_t{1} << 48, "embedding_dim is no row's");
    const std::string_view bits = cut_off(text), param_dtype = text.substr(0, text.find(':'));
    text.remove_prefix(param_dtype.size());
    require(param_dtype == "float16" || param_dtype == "float32", "param_dtype must be float16 or float32");
    require(text.empty() || text == ":hadamard", "rotation must be hadamard");
    rules_of(format.layout).set_bits(format, bits, param_dtype == "float16");
    format.is_rotated = !text.empty();
    return format;
}

std::vector<std::string_view> layout_names() {
    std::vector<std::string_view> names;
    for (const LayoutRules& rules : layouts) names.push_back(rules.name);
    return names;
}

bool has_array_by_row(Layout layout) { return rules_of(layout).has_array_by_row; }
bool has_shared_array(Layout layout) { return rules_of(layout).has_shared_array; }

PackedRows make_rows(const void* packed, size_t num_rows, size_t row_bytes, const RowFormat& format,
                     const Beside& beside) {
    require(row_bytes == format.row_bytes, "packed has the wrong row bytes");
    require(has_array_by_row(format.layout) == (beside.by_row.entry_bytes > 0) &&
                has_shared_array(format.layout) == (beside.shared.entry_bytes > 0),
            "clusters and codebooks go with the layouts that have them");
    PackedRows rows{static_cast<const uint8_t*>(packed), num_rows, format.embedding_dim, row_bytes, format.grid,
                    format.layout};
    rows.is_rotated = format.is_rotated;
    rules_of(format.layout).use(rows, beside);
    return rows;
}

}  // namespace embpack
