// Numbers of trellis-coded levels, made bit after bit.

template <bool is_full, size_t slots, class Columns, class Levels, class Read>
[[gnu::always_inline]] inline TrellisNumbers<slots> make_trellis_numbers(const uint8_t* row, const Columns& of,
                                                                         const Levels& levels, uint64_t c0,
                                                                         uint64_t c1, const Read& read) {
    TrellisNumbers<slots> numbers(of.present);
    numbers.template add<is_full>(of.present, c0, levels.weight(0));
    numbers.template add<is_full>(of.present, c1, levels.weight(1));
    unrolled<Levels::most_planes>([&](size_t k) __attribute__((always_inline)) {
        if (k < of.planes) [[likely]] numbers.template add<is_full>(of.present, read(k + 1), levels.weight(k + 2));
    });
    levels.template finish<is_full>(numbers, of, row, read);
    return numbers;
}
