#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

// Pools the bags of several tables. The fault is that of the first lookup that has one, whose number is given.
LookupFault pool(std::vector<Lookup> lookups, size_t& faulty_lookup);

}  // namespace embpack
