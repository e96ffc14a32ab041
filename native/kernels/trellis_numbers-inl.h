// Numbers of trellis-coded levels, made bit after bit, and levels looked up vector by vector.

template <bool is_full, size_t slots, class Columns, class Levels, class Read>
[[gnu::always_inline]] inline TrellisNumbers<slots> make_trellis_numbers(const uint8_t* row, const Columns& of,
                                                                         const Levels& levels, const Read& read) {
    const Subsets subsets(read(0), row[of.before]);
    TrellisNumbers<slots> numbers(of.present);
    numbers.template add<is_full>(of.present, subsets.c0, levels.weight(0));
    numbers.template add<is_full>(of.present, subsets.c1, levels.weight(1));
    unrolled<Levels::most_planes>([&](size_t k) __attribute__((always_inline)) {
        if (k < of.planes) [[likely]] numbers.template add<is_full>(of.present, read(k + 1), levels.weight(k + 2));
    });
    levels.template finish<is_full>(numbers, of, row, read);
    return numbers;
}

// What is known of rows when this is compiled: nothing here.
template <class Levels>
inline constexpr size_t known_dim = 0;
template <class Levels, class Columns>
[[gnu::always_inline]] inline const Columns& known_columns(const Columns& of) { return of; }

// What levels are looked up by in one block.
template <size_t slots>
struct LevelsOfBlock {
    LevelsOfBlock() = default;
    template <class Columns>
    [[gnu::always_inline]] explicit LevelsOfBlock(const Columns&) {}

    template <class Levels, class Columns>
    [[gnu::always_inline]] auto look_up(const Levels& levels, const Columns& of, TrellisNumbers<slots> numbers) const {
        return [&levels, &of, numbers](size_t v) __attribute__((always_inline)) { return levels(numbers, of, v); };
    }
};
