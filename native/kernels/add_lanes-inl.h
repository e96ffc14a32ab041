// The sum of sixteen lanes, by halves.
inline float add_lanes(F32x16 x) {
    x = add(x, exchange<8>(x));
    x = add(x, exchange<4>(x));
    x = add(x, exchange<2>(x));
    float first[16];
    store(first, add(x, exchange<1>(x)));
    return first[0];
}
