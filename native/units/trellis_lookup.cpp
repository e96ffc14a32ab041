// Lookups of trellis-coded rows, for one instruction set: EMBPACK_ISA, whose vectors are in the file EMBPACK_VECTORS and
// what it does with bits in EMBPACK_TRELLIS. Compiled once for each.
#include EMBPACK_VECTORS

namespace embpack::EMBPACK_ISA {
namespace {
#include "../kernels/basics-inl.h"
}
}  // namespace embpack::EMBPACK_ISA

#include EMBPACK_TRELLIS

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t most_tile_vectors = most_trellis_sums;

#include "../kernels/store-inl.h"
#include "../kernels/window-inl.h"
#include "../kernels/tile-inl.h"
#include "../kernels/pool-inl.h"
#include "../kernels/trellis_blocks-inl.h"
#include "../kernels/trellis_lookup-inl.h"

}  // namespace

extern const Lookups trellis_lookups;
const Lookups trellis_lookups = {gather_trellis_rows, pool_trellis_bags};

}  // namespace embpack::EMBPACK_ISA
