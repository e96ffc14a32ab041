// The searches that need only the bounds of a row or of the table (Guan et al. 2019, section 3: ASYM, SYM,
// TABLE).

void search_asym(const RowBlock&, Grid, const SearchParams&, Ranges&, float*) noexcept {
    // The bounds are the range.
}

void search_sym(const RowBlock& block, Grid, const SearchParams&, Ranges& ranges, float*) noexcept {
    for (size_t row = 0; row < block.num_rows; row++) {
        const float low = __builtin_fabsf(ranges.xmin[row]), high = __builtin_fabsf(ranges.xmax[row]);
        const float xmax = low < high ? high : low;
        ranges.xmin[row] = -xmax;
        ranges.xmax[row] = xmax;
    }
}

void search_table(const RowBlock& block, Grid, const SearchParams& params, Ranges& ranges, float*) noexcept {
    for (size_t row = 0; row < block.num_rows; row++) {
        ranges.xmin[row] = params.xmin;
        ranges.xmax[row] = params.xmax;
    }
}
