// From a clipping range to scale and bias, sixteen ranges at once. The arithmetic is that of PyTorch's and
// FBGEMM's row quantizers, rounding by rounding; see docs/format.md.

struct GridParams {
    F32x16 scale, bias, inverse;   // code = round((x - bias) * inverse), value = scale * code + bias
};

// The same of the ranges in one register.
struct PartParams {
    Part scale, bias, inverse;

    PartParams(const GridParams& p, size_t i)
        : scale(part_of(p.scale, i)), bias(part_of(p.bias, i)), inverse(part_of(p.inverse, i)) {}
};

inline F32x16 top_code(Grid grid) { return splat(static_cast<float>((1 << grid.bits) - 1)); }

template <bool f16_params>
inline GridParams make_grid_f16_or_f32(F32x16 xmin, F32x16 xmax, F32x16 top) {
    const F32x16 one = splat(1.0f), zero = splat(0.0f);
    const F32x16 bias = f16_params ? round_f16(xmin) : xmin;
    const F32x16 range = sub(xmax, bias);
    if constexpr (f16_params) {
        // The inverse is finite: no scale is as small as 2^-25.
        F32x16 scale = round_f16(div(range, top));
        scale = select(equal(scale, zero), one, scale);
        return {scale, bias, div(one, scale)};
    }
    F32x16 scale = select(equal(range, zero), one, div(range, top));
    scale = select(equal(scale, zero), one, scale);
    const F32x16 inverse = div(one, scale);
    // Only a subnormal float32 scale has an infinite inverse.
    const Mask16 usable = finite(inverse);
    return {select(usable, scale, one), bias, select(usable, inverse, one)};
}

inline GridParams make_grid(F32x16 xmin, F32x16 xmax, Grid grid) {
    const F32x16 top = top_code(grid);
    if (grid.f16_params) return make_grid_f16_or_f32<true>(xmin, xmax, top);
    if (grid.bits != 8) return make_grid_f16_or_f32<false>(xmin, xmax, top);
    const F32x16 range = sub(xmax, xmin);
    return {div(range, top), xmin, div(top, add(range, splat(1e-8f)))};
}
