// Lookups of uniform rows and of rows with codebooks, for one instruction set: EMBPACK_ISA, whose vectors are in the
// file EMBPACK_VECTORS. Compiled once for each.
#include EMBPACK_VECTORS

#include "../exact_units.h"

namespace embpack::EMBPACK_ISA {
namespace {

#include "../isa/contract-inl.h"

constexpr size_t most_tile_vectors = most_sums;

#include "../kernels/basics-inl.h"
#include "../kernels/store-inl.h"
#include "../kernels/levels-inl.h"
#include "../kernels/window-inl.h"
#include "../kernels/tile-inl.h"
#include "../kernels/pool-inl.h"
#include "../kernels/halves-inl.h"
#include "../kernels/lookup-inl.h"

}  // namespace

extern const Lookups lookups;
const Lookups lookups = {gather_rows, pool_bags};

}  // namespace embpack::EMBPACK_ISA
