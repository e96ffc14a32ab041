// What FBGEMM asks about AVX-512, answered by no: isas.py says when, and why.
// Loaded before PyTorch and for all libraries, these stand in for the functions of the same names there.

static int asked = 0;

namespace fbgemm {
bool fbgemmHasAvx512Support() {
    ++asked;
    return false;
}
bool fbgemmHasAvx512VnniSupport() { return false; }
bool fbgemmHasAvx512Bf16Support() { return false; }
}  // namespace fbgemm

// How often it was asked whether there is AVX-512.
extern "C" int times_asked_for_avx512() { return asked; }
