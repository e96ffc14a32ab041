// Which of some centres is nearest to each row. A row's score for a centre is minus half the centre's square, to which
// the products of their values are added one after the other, each product and each sum rounded; the largest score is
// that of the nearest. A multiply-add would round once, but the C library's, where the CPU has none, takes too long.

// Rows whose scores fill the registers, together with a column of the panel.
inline constexpr size_t scored_rows = product_sums * 3 / 2;
static_assert(nearest_rows % scored_rows == 0);

// The best score of a row so far in each lane, and which panel had it.
struct Nearest {
    F32x16 score, panel;
};

// Of the lanes the one with the best score; of equal ones the centre with the lowest number.
inline uint32_t number_of(const Nearest& nearest) {
    float score[16], panel[16];
    store(score, nearest.score);
    store(panel, nearest.panel);
    float best = score[0];
    uint32_t number = 16 * static_cast<uint32_t>(panel[0]);
    for (uint32_t lane = 1; lane < 16; lane++) {
        const uint32_t own = 16 * static_cast<uint32_t>(panel[lane]) + lane;
        if (!(score[lane] > best || (score[lane] == best && own < number))) continue;
        best = score[lane];
        number = own;
    }
    return number;
}

void find_nearest(const ValueRows& rows, const Centres& centres, uint32_t* numbers) noexcept {
    Nearest nearest[nearest_rows];
    for (size_t i = 0; i < rows.num_rows; i++) nearest[i] = {splat(-__builtin_inff()), splat(0.0f)};
    const size_t d = rows.num_columns;
    for (size_t panel = 0; panel < centres.num_panels; panel++) {
        const float* const values = centres.panels + panel * 16 * (d + 1);
        const F32x16 start = load(values), number = splat(static_cast<float>(panel));
        for (size_t first = 0; first < rows.num_rows; first += scored_rows) {
            const float* row[scored_rows];
            F32x16 score[scored_rows];
            unrolled<scored_rows>([&](size_t r) {   // past the last row, it is scored again
                row[r] = rows.values + smaller(first + r, rows.num_rows - 1) * rows.stride;
                score[r] = start;
            });
            for (size_t j = 0; j < d; j++) {
                const F32x16 of_centres = load(values + 16 * (j + 1));
                unrolled<scored_rows>([&](size_t r) { score[r] = add(score[r], mul(splat_at(row[r] + j), of_centres)); });
            }
            unrolled<scored_rows>([&](size_t r) {
                Nearest& own = nearest[smaller(first + r, rows.num_rows - 1)];
                const Mask16 is_nearer = less(own.score, score[r]);
                own = {select(is_nearer, score[r], own.score), select(is_nearer, number, own.panel)};
            });
        }
    }
    for (size_t i = 0; i < rows.num_rows; i++) numbers[i] = number_of(nearest[i]);
}
