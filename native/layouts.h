// What differs by layout, but for the kernels: a line of a table for each (layouts.cpp). Both kinds of bindings, of
// NumPy's arrays and of PyTorch's tensors, go through it. src/embpack/layouts is the same for Python.
#pragma once

#include <stdexcept>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace embpack {

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// Throws std::invalid_argument for bits that codes do not have.
Grid make_grid(int bits, bool f16_params);

// What a row's bytes mean, written as embpack.layouts.RowFormat is: "uniform:64:4:float16", maybe with ":hadamard".
struct RowFormat {
    Layout layout;
    size_t embedding_dim;
    Grid grid;   // nothing is read of a trellis-coded row's
    size_t row_bytes;
    bool is_rotated;
};

// Throws std::invalid_argument if the text is no row format.
RowFormat parse_row_format(std::string_view text);

// The arrays beside the rows of a table: one with something for each row, such as the number of its codebook, and one
// that the rows share, such as these codebooks.
struct Beside {
    struct Array {
        const void* bytes = nullptr;
        size_t count = 0, entry_bytes = 0;   // no bytes in an entry: there is no array
    };
    Array by_row, shared;
};

// Names of the layouts, in the order of Layout.
std::vector<std::string_view> layout_names();

// Which of them a layout has.
bool has_array_by_row(Layout);
bool has_shared_array(Layout);

// Rows of a table. Throws std::invalid_argument if the arrays are not what the format says.
PackedRows make_rows(const void* packed, size_t num_rows, size_t row_bytes, const RowFormat&, const Beside&);

}  // namespace embpack
