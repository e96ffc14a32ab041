// What AVX2 and AVX-512 share: the CPU notes when a conversion to float16, or arithmetic, makes infinity of finite values.
#include <immintrin.h>

namespace embpack::EMBPACK_ISA {
namespace {

// What is stored before the question is asked has been computed: memory may not be touched across it.
constexpr bool notes_overflow = true;
inline void forget_overflow() {
    asm volatile("" : : : "memory");
    if (_mm_getcsr() & _MM_EXCEPT_OVERFLOW) _mm_setcsr(_mm_getcsr() & ~static_cast<unsigned>(_MM_EXCEPT_OVERFLOW));
    asm volatile("" : : : "memory");
}
inline bool has_noted_overflow() {
    asm volatile("" : : : "memory");
    return _mm_getcsr() & _MM_EXCEPT_OVERFLOW;
}

}  // namespace
}  // namespace embpack::EMBPACK_ISA
