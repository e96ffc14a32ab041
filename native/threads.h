#pragma once

#include <cstddef>

namespace embpack {

// Threads that a parallel loop uses when there is work for all of them: OMP_NUM_THREADS or the CPUs available,
// until set_num_threads. Survives fork: a child starts threads of its own.
int num_threads();
void set_num_threads(int count);

// num_threads(), or fewer where starting them would cost more than the work of `values` values.
int threads_for(size_t values);

}  // namespace embpack
