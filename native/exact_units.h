// When the sums of bags are exact, whatever their order: see kernels/exact_sums-inl.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace embpack {
namespace {

// Scales are multiples of `unit` by integers of 15 bits, and the sums of bags of up to `most_rows` rows are exact; 0 if
// none are.
struct ExactUnits {
    float unit = 0.0f;
    size_t most_rows = 0;
};

// What a bag's sums are made of: bias + unit * sum(multiplier * code).
struct ExactSum {
    float unit, bias;
};

// Magnitudes of float16, of scales in the lower halves and of biases in the upper ones: the least that is not 0, less 1,
// and the largest. A scale that has a sign, -0 too, counts as larger than infinity, so no bag that has one is exact.
struct ParamRange {
    uint32_t least_less_1, largest;
};

[[gnu::always_inline]] inline ExactUnits find_exact_units(ParamRange range) {
    constexpr uint32_t infinity = 0x7c00, most_exponent = 30;
    constexpr float largest_code = 15.0f;
    const auto power_of_two = [](uint32_t exponent_of_float) {
        const uint32_t bits = exponent_of_float << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        return power;
    };
    // Of a magnitude. A denormal has that of the least normal one; where there was nothing but 0, any will do.
    const auto exponent = [](uint32_t magnitude) {
        const uint32_t bits = magnitude >> 10;
        return bits < 1 ? 1 : bits < most_exponent ? bits : most_exponent;
    };
    // The lowest bit of a float16 counts 2^(exponent - 25).
    const auto lowest_bit = [&](uint32_t of) { return power_of_two(of + 127 - 25); };
    const auto value = [&](uint32_t magnitude) {
        const uint32_t bits = (magnitude & 0x3ff) + (magnitude < 0x400 ? 0 : 0x400);
        return static_cast<float>(bits) * lowest_bit(exponent(magnitude));
    };
    const uint32_t scales = exponent((range.least_less_1 & 0xffff) + 1), biases = exponent((range.least_less_1 >> 16) + 1);
    const uint32_t largest_scale = range.largest & 0xffff, largest_bias = range.largest >> 16;
    // Eleven bits and four for how far apart scales may be.
    if (largest_scale >= infinity || largest_bias >= infinity || exponent(largest_scale) > scales + 4) return {};
    // All levels, and so their sums, are multiples of the smaller unit. Float32 holds 2^24 of them. A sum of codes times
    // multipliers is less, for it is a multiple of 15 at its most, which 2^24 is not: 256 times as much fits 32 bits. What
    // is rounded here lets no bag in: of two rows or more the largest level is exact, and a quotient below a whole number
    // is not rounded up to it; one row is rounded but once, whatever the order.
    const float most_sum = 0x1p24f * lowest_bit(scales < biases ? scales : biases);
    const float most_level = largest_code * value(largest_scale) + value(largest_bias);
    const float most_rows = most_level > 0.0f ? most_sum / most_level : most_sum / lowest_bit(1);
    return {lowest_bit(scales), static_cast<size_t>(most_rows)};
}

}  // namespace
}  // namespace embpack
