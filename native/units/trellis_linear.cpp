// Products of trellis-coded rows with vectors, for one instruction set: EMBPACK_ISA, whose vectors are in the file
// EMBPACK_VECTORS and what it does with bits in EMBPACK_TRELLIS. Compiled once for each.
#include EMBPACK_VECTORS

namespace embpack::EMBPACK_ISA {
namespace {
#include "../kernels/basics-inl.h"
}
}  // namespace embpack::EMBPACK_ISA

#include EMBPACK_TRELLIS

namespace embpack::EMBPACK_ISA {
namespace {

#include "../kernels/trellis_blocks-inl.h"
#include "../kernels/add_lanes-inl.h"
#include "../kernels/trellis_linear-inl.h"

}  // namespace

extern const TrellisProducts trellis_products;
const TrellisProducts trellis_products = {multiply_levels};

}  // namespace embpack::EMBPACK_ISA
