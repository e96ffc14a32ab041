#include "dispatch.h"

#include <atomic>
#include <iterator>
#include <span>
#include <stdexcept>

#ifdef EMBPACK_HAS_avx2
#include <cpuid.h>
#endif

namespace embpack {

// What units/*.cpp define for an instruction set.
#define EMBPACK_DECLARE(isa)                       \
    namespace isa {                                \
    extern const PackingKernels packing;           \
    extern const Lookups lookups;                  \
    extern const Lookups trellis_lookups;          \
    extern const Products products;                \
    extern const TrellisProducts trellis_products; \
    }
#ifdef EMBPACK_HAS_avx512_gfni
namespace avx512_gfni {
extern const Lookups trellis_lookups;
extern const TrellisProducts trellis_products;
}
#endif
#ifdef EMBPACK_HAS_avx512
EMBPACK_DECLARE(avx512)
#endif
#ifdef EMBPACK_HAS_avx2
EMBPACK_DECLARE(avx2)
#endif
#ifdef EMBPACK_HAS_portable
EMBPACK_DECLARE(portable)
#endif

namespace {

struct Isa {
    Kernels kernels;
    bool (*runs_here)();
};

Kernels combine(const char* name, const PackingKernels& packing, const Lookups& lookups,
                const Lookups& trellis_lookups, const Products& products, const TrellisProducts& trellis_products) {
    Kernels kernels{packing, name, {}, products, trellis_products};
    for (Lookups& of_layout : kernels.lookups) of_layout = lookups;
    kernels.lookups[static_cast<size_t>(Layout::trellis)] = trellis_lookups;
    return kernels;
}
#define EMBPACK_KERNELS(isa) \
    combine(#isa, isa::packing, isa::lookups, isa::trellis_lookups, isa::products, isa::trellis_products)

#ifdef EMBPACK_HAS_avx512
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
}
#endif

#ifdef EMBPACK_HAS_avx2
// Clang's __builtin_cpu_supports does not know it.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// Those that were compiled, best first.
std::span<const Isa> isas() {
    static const Isa all[] = {
#ifdef EMBPACK_HAS_avx512_gfni
        {combine("avx512_gfni", avx512::packing, avx512::lookups, avx512_gfni::trellis_lookups, avx512::products,
                 avx512_gfni::trellis_products),
         [] {
             return has_avx512() && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2");
         }},
#endif
#ifdef EMBPACK_HAS_avx512
        {EMBPACK_KERNELS(avx512), has_avx512},
#endif
#ifdef EMBPACK_HAS_avx2
        {EMBPACK_KERNELS(avx2),
         [] {
             return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
         }},
#endif
#ifdef EMBPACK_HAS_portable
        {EMBPACK_KERNELS(portable), [] { return true; }},
#endif
    };
    static_assert(std::size(all) == EMBPACK_NUM_ISAS, "an instruction set that CMakeLists.txt lists is not here");
    return all;
}

const Kernels* best() {
    for (const Isa& isa : isas())
        if (isa.runs_here()) return &isa.kernels;
    throw std::runtime_error("embpack was built without an instruction set that this CPU runs; build it with portable "
                             "among EMBPACK_ISAS");
}

std::atomic<const Kernels*>& in_use() {
    static std::atomic<const Kernels*> chosen{best()};
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

std::vector<std::string_view> available_isas() {
    std::vector<std::string_view> names;
    for (const Isa& isa : isas())
        if (isa.runs_here()) names.emplace_back(isa.kernels.isa);
    return names;
}

bool use_isa(std::string_view name) {
    for (const Isa& isa : isas()) {
        if (isa.kernels.isa != name || !isa.runs_here()) continue;
        in_use().store(&isa.kernels, std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace embpack
