// Lookups of any layout.

void gather_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                 const Output& out, LookupFault& fault) noexcept {
    if (rows.layout == Layout::trellis) return gather_trellis_rows(rows, indices, prefetches, first, end, out, fault);
    const Bags bags{.indices = indices, .prefetches = prefetches};
    RowReader reader(rows, bags, first, end, true, fault);
    if (rows.grid.bits == 2) return store_rows<2>(reader, first, out);
    if (rows.grid.bits == 4) return store_rows<4>(reader, first, out);
    store_rows<8>(reader, first, out);
}

void pool_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
               LookupFault& fault) noexcept {
    if (rows.layout == Layout::trellis) return pool_trellis_bags(rows, bags, first, end, out, fault);
    const bool are_read_once = first_tile(rows.embedding_dim).num_columns() == rows.embedding_dim;
    RowReader reader(rows, bags, bags.start(first), bags.start(end), are_read_once, fault);
    if (rows.grid.bits == 2) return pool_bags_of<2>(reader, first, end, out);
    if (rows.grid.bits == 4) return pool_bags_of<4>(reader, first, end, out);
    pool_bags_of<8>(reader, first, end, out);
}
