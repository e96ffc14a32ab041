// Products of rows with vectors, for one instruction set: EMBPACK_ISA, whose vectors are in the file EMBPACK_VECTORS.
// Compiled once for each.
#include EMBPACK_VECTORS

namespace embpack::EMBPACK_ISA {
namespace {

#include "../isa/contract-inl.h"
#include "../kernels/basics-inl.h"
#include "../kernels/add_lanes-inl.h"
#include "../kernels/linear-inl.h"

}  // namespace

extern const Products products;
const Products products = {multiply_words, multiply_panel};

}  // namespace embpack::EMBPACK_ISA
