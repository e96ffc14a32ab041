// The only part of a vector, for instruction sets whose vectors are one register: contract-inl.h.
using Part = F32x16;
constexpr size_t parts = 1;
inline Part& part_of(F32x16& x, size_t) { return x; }
inline Part part_of(const F32x16& x, size_t) { return x; }
inline Part load_part(const float* p) { return load(p); }
inline Part splat_part(float x) { return splat(x); }
