// Writing codes and floats of a row whose lanes have their scales: a group of lanes at a time, whose number the compiler
// knows.

namespace {

constexpr int64_t GROUP = 64;  // a line of codes, four lines of floats

// What the lanes of a row need, each a number a lane.
struct Lanes {
    const float *step, *factor, *zero;
    const uint32_t* index;

    Lanes operator+(int64_t lanes) const { return {step + lanes, factor + lanes, zero + lanes, index + lanes}; }
};

// A row that is written.
struct Target {
    const float* x;
    uint8_t* codes;
    float* floats;
    uint32_t seed;

    Target operator+(int64_t lanes) const { return {x + lanes, codes + lanes, floats + lanes, seed}; }
};

// A power of two is multiplied by its inverse; a scale with a zero point, or that is none, divides. Codes become bytes in
// a loop of their own: one loop for both needs more registers than there are.
template <bool DIVIDES, bool STOCHASTIC, bool CODES, bool FLOATS>
[[gnu::always_inline]] inline void write_group(const Task& task, const Lanes& lane, const Target& row) {
    const float lowest = task.lowest, largest = task.largest;
    const uint32_t limit = task.limit, seed = row.seed;
    const float* __restrict x = row.x;
    const float* __restrict step = lane.step;
    const float* __restrict factor = lane.factor;
    const float* __restrict zero = lane.zero;
    const uint32_t* __restrict index = lane.index;
    uint8_t* __restrict codes = row.codes;
    float* __restrict floats = row.floats;
    alignas(64) int32_t code[GROUP];
#pragma omp simd
    for (int64_t i = 0; i < GROUP; ++i) {
        const float real = DIVIDES ? x[i] / factor[i] : x[i] * step[i], origin = DIVIDES ? zero[i] : 0.0f;
        code[i] = round_code<STOCHASTIC>(real, seed + index[i], origin, lowest, largest);
        if (FLOATS) floats[i] = show_code(code[i], origin, factor[i], x[i], limit);
    }
    if (!CODES) return;
#pragma omp simd
    for (int64_t i = 0; i < GROUP; ++i) codes[i] = static_cast<uint8_t>(code[i]);
}

inline void fetch_group(const float* x) {
    for (int64_t line = 0; line < GROUP; line += 16) __builtin_prefetch(x + line);
}

// Writes a row, and fetches what lies ahead meanwhile: a burst of fetches in front of the row would wait for memory.
template <bool DIVIDES, bool STOCHASTIC, bool CODES, bool FLOATS>
[[gnu::noinline]] void write_row(const Task& task, const Lanes& lane, int64_t groups, int64_t ahead, const Target& row) {
    for (int64_t first = 0; first < groups * GROUP; first += GROUP) {
        fetch_group(row.x + first + ahead);
        write_group<DIVIDES, STOCHASTIC, CODES, FLOATS>(task, lane + first, row + first);
    }
}

using WriteRow = void (*)(const Task& task, const Lanes& lane, int64_t groups, int64_t ahead, const Target& row);

template <bool DIVIDES, bool STOCHASTIC>
WriteRow choose_results(bool codes, bool floats) {
    if (!floats) return write_row<DIVIDES, STOCHASTIC, true, false>;
    return codes ? write_row<DIVIDES, STOCHASTIC, true, true> : write_row<DIVIDES, STOCHASTIC, false, true>;
}

// How the results that are wanted are written; `data` has codes, floats and key, each null if it is not there.
template <typename Data>
WriteRow choose_row(const Data& data, bool divides) {
    if (divides)
        return data.key ? choose_results<true, true>(data.codes, data.floats.data)
                        : choose_results<true, false>(data.codes, data.floats.data);
    return data.key ? choose_results<false, true>(data.codes, data.floats.data)
                    : choose_results<false, false>(data.codes, data.floats.data);
}

// Writes any number of lanes; the last ones, fewer than a group, by way of memory that has room for a group.
void write_lanes(WriteRow write, const Task& task, const Lanes& lane, int64_t lanes, int64_t ahead, const Target& row,
                 bool has_codes, bool has_floats) {
    const int64_t done = lanes / GROUP * GROUP, rest = lanes - done;
    write(task, lane, lanes / GROUP, ahead, row);
    if (!rest) return;
    float x[GROUP]{}, floats[GROUP];
    uint8_t codes[GROUP];
    std::copy_n(row.x + done, rest, x);
    write(task, lane + done, 1, 0, Target{x, codes, floats, row.seed});
    if (has_codes) std::copy_n(codes, rest, row.codes + done);
    if (has_floats) std::copy_n(floats, rest, row.floats + done);
}

}  // namespace
