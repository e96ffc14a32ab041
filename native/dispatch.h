#pragma once

#include <string_view>
#include <vector>

#include "kernels.h"

namespace embpack {

// The kernels in use: the best that this CPU runs, until use_isa says otherwise.
const Kernels& kernels();

// Names of the instruction sets that this CPU runs, best first.
std::vector<std::string_view> available_isas();

// Makes `name` the one in use. False if this CPU or this build does not have it.
bool use_isa(std::string_view name);

}  // namespace embpack
