#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels.h"

namespace embpack {

// Looks rows up: each indices[i], or row i of the table for as many rows as it has where there are no indices.
LookupFault gather(const PackedRows&, const Integers& indices, const Output&);

// Bags of one table, and where they go.
struct Lookup {
    PackedRows rows;
    Bags bags;
    Output out;
};

// Pools bags first .. end of a lookup by an instruction set's kernels, on this thread; what PoolBagsFn says of faults
// holds here, too.
void pool_bags(const Kernels&, const Lookup&, size_t first, size_t end, LookupFault&);

// Pools the bags of several tables, and says in them whether rows are prefetched. The fault is that of the first lookup
// that has one, whose number is given.
LookupFault pool(std::span<Lookup> lookups, size_t& faulty_lookup);

}  // namespace embpack
