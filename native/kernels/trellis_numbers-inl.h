// Numbers of trellis-coded levels, made bit after bit, and levels looked up vector by vector. Included by instruction
// sets that have no better way; beside what trellis_blocks-inl.h lists, it needs of them:
//
//     TrellisNumbers<slots>(present)      all numbers 0
//         .add<is_full>(present, bits, weight)   adds `weight` to the numbers of the positions whose bits are set
//     Levels::most_index_planes           index planes that are added here, at most
//     levels.weight(k)                    what bit k of a number counts, 2^k, as `add` takes it
//     levels.finish<is_full>(numbers, block, row, read)   does what is left: top bits, and index planes past the most
//     levels(numbers, block, v)           the levels of vector v

// Bit 0 of a number is c0, bit 1 is c1, bit k + 2 is bit k of the index.
template <bool is_full, size_t slots, class Block, class Levels, class Read>
[[gnu::always_inline]] inline TrellisNumbers<slots> make_trellis_numbers(const uint8_t* row, const Block& block,
                                                                         const Levels& levels, const Read& read) {
    const Subsets subsets(read(0), row[block.byte_before]);
    TrellisNumbers<slots> numbers(block.present);
    numbers.template add<is_full>(block.present, subsets.c0, levels.weight(0));
    numbers.template add<is_full>(block.present, subsets.c1, levels.weight(1));
    unrolled<Levels::most_index_planes>([&](size_t k) __attribute__((always_inline)) {
        if (k < block.index_planes) [[likely]]
            numbers.template add<is_full>(block.present, read(k + 1), levels.weight(k + 2));
    });
    levels.template finish<is_full>(numbers, block, row, read);
    return numbers;
}

// These instruction sets have no code for rows of one shape alone.
template <class Use>
inline bool with_known_levels(const TrellisShape&, WideVectors, const Use&) { return false; }
template <class Levels>
inline constexpr size_t known_dim = 0;
template <class Levels, class Block>
[[gnu::always_inline]] inline const Block& known_block(const Block& block) { return block; }

// Nothing is needed of a block but ColumnBlock's members.
template <size_t slots>
struct BlockLookup {
    BlockLookup() = default;
    template <class Block>
    [[gnu::always_inline]] explicit BlockLookup(const Block&) {}

    template <class Levels, class Block, class Numbers>
    [[gnu::always_inline]] auto look_up(const Levels& levels, const Block& block, const Numbers& numbers) const {
        return [&levels, &block, &numbers](size_t v)
            __attribute__((always_inline)) { return levels(numbers, block, v); };
    }
};
