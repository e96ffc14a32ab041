#include "dispatch.h"

#include <atomic>

namespace embpack {

#ifdef EMBPACK_X86
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_gfni {
extern const Lookups lookups;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

struct Isa {
    const Kernels* kernels;
    bool (*runs_here)();
};

#ifdef EMBPACK_X86
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
}

const Kernels with_gfni = [] {
    Kernels kernels = avx512::kernels;
    kernels.isa = "avx512_gfni";
    kernels.gather_rows = avx512_gfni::lookups.gather_rows;
    kernels.pool_bags = avx512_gfni::lookups.pool_bags;
    return kernels;
}();
#endif

// Best first.
const Isa isas[] = {
#ifdef EMBPACK_X86
    {&with_gfni,
     [] {
         return has_avx512() && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512vbmi") &&
                __builtin_cpu_supports("avx512vbmi2");
     }},
    {&avx512::kernels, has_avx512},
    {&avx2::kernels,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
#endif
    {&portable::kernels, [] { return true; }},
};

const Kernels* best() {
    for (const Isa& isa : isas)
        if (isa.runs_here()) return isa.kernels;
    return &portable::kernels;
}

std::atomic<const Kernels*>& in_use() {
    static std::atomic<const Kernels*> chosen{best()};
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

std::vector<std::string_view> available_isas() {
    std::vector<std::string_view> names;
    for (const Isa& isa : isas)
        if (isa.runs_here()) names.emplace_back(isa.kernels->isa);
    return names;
}

bool use_isa(std::string_view name) {
    for (const Isa& isa : isas) {
        if (isa.kernels->isa != name || !isa.runs_here()) continue;
        in_use().store(isa.kernels, std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace embpack
