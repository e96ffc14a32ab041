#pragma once

#include <cstddef>

namespace embpack {

// Threads that a parallel loop uses when there is work for all of them: OMP_NUM_THREADS or the CPUs available,
// until set_num_threads. Survives fork: a child starts threads of its own.
int num_threads();
void set_num_threads(int count);

// num_threads(), or fewer where starting them would cost more than the work of `values` values.
int threads_for(size_t values);

// Calls run(i) for each i below `count`, by that many threads. One thread needs no team, whose start costs as much as
// pooling a hundred rows.
template <class Run>
void for_each_piece(size_t count, int threads, const Run& run) {
    if (threads == 1) {
        for (size_t i = 0; i < count; i++) run(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < count; i++) run(i);
}

}  // namespace embpack
