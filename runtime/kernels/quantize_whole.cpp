// Quantize a dense tensor with one scale: by a scale that is known, while measuring what a range of the past learns, or
// by one that is found in a pass of its own; the numbers are those of runtime/references.py, bit for bit.

#include "tiles.h"
#include "scales.h"

namespace {

constexpr float INFINITY_ = __builtin_inff(), NAN_ = __builtin_nanf("");

enum Kind : int64_t { SIGNED, UNSIGNED, AFFINE };  // of the format: what its range is made of

struct Data {
    const float* x;
    uint8_t* codes;             // null: not wanted
    float* floats;              // null: not wanted
    void* scale;                // float or uint8_t
    const uint8_t* zero_point;  // null: 0
    const int32_t* key;         // null: to nearest
    int64_t threads, kind;
    // of a scale that is known
    const float* reach;  // the smallest and the largest value that is not clipped
    float* measured;     // the ends of the range of the tensor, and the fraction of all elements that is clipped
    void* checked;       // the scale, NaN if an element is NaN or infinite
};

// What a part of the tensor has shown; NaN counts in `largest` alone.
struct Seen {
    float low = INFINITY_, high = -INFINITY_;
    uint32_t largest = 0;
    int64_t outside = 0;

    void add(const Seen& other) {
        low = other.low < low ? other.low : low;
        high = other.high > high ? other.high : high;
        largest = larger(largest, other.largest);
        outside += other.outside;
    }
};

struct Space : Walk {
    Seen seen;

    explicit Space(int64_t lanes) : Walk(lanes) {}
};

// The numbers of the quantizer.
struct Rule {
    float factor, zero, low, high;
};

template <bool MEASURES, bool STOCHASTIC, bool CODES, bool FLOATS>
[[gnu::noinline]] void write_row(const Task& task, const Rule& rule, int64_t lanes, const float* __restrict x,
                                 const uint32_t* __restrict index, uint32_t seed, uint8_t* __restrict codes,
                                 float* __restrict floats, Seen& seen) {
    const float lowest = task.lowest, most = task.largest;
    const uint32_t limit = task.limit;
    const auto [factor, zero, reach_low, reach_high] = rule;
    float low = seen.low, high = seen.high;
    uint32_t largest = seen.largest;
    int32_t outside = 0;
#pragma omp simd reduction(min : low) reduction(max : high, largest) reduction(+ : outside)
    for (int64_t i = 0; i < lanes; ++i) {
        const float value = x[i], real = value / factor;
        if (MEASURES) {
            low = value < low ? value : low;
            high = value > high ? value : high;
            largest = larger(largest, magnitude(value));
            outside += (value < reach_low) | (value > reach_high);
        }
        const int32_t code = round_code<STOCHASTIC>(real, seed + index[i], zero, lowest, most);
        if (CODES) codes[i] = static_cast<uint8_t>(code);
        if (FLOATS) floats[i] = show_code(code, zero, factor, value, limit);
    }
    seen.add(Seen{low, high, largest, outside});
}

template <bool MEASURES, bool STOCHASTIC, bool CODES, bool FLOATS>
Seen quantize(const Task& task, const Data& data, const Rule& rule) {
    const uint32_t seed = STOCHASTIC ? make_seed(task, data.key) : 0;
    Seen all;
    const auto work = [&](const Corner& corner, Space& space) {
        if (STOCHASTIC) number_lanes(task, corner, space);
        write_row<MEASURES, STOCHASTIC, CODES, FLOATS>(
            task, rule, corner.strips * corner.lanes_a_strip, data.x + corner.place, space.index.data(),
            seed + corner.logical * SPREAD, data.codes + corner.place, data.floats + corner.place, space.seen);
    };
    run_tiles<Space>(task, data.threads, work, [&](const Space& space) { all.add(space.seen); });
    return all;
}

template <bool MEASURES, bool STOCHASTIC>
Seen quantize_into(const Task& task, const Data& data, const Rule& rule) {
    if (data.codes && data.floats) return quantize<MEASURES, STOCHASTIC, true, true>(task, data, rule);
    if (data.codes) return quantize<MEASURES, STOCHASTIC, true, false>(task, data, rule);
    return quantize<MEASURES, STOCHASTIC, false, true>(task, data, rule);
}

template <bool MEASURES>
Seen quantize_by(const Task& task, const Data& data, const Rule& rule) {
    return data.key ? quantize_into<MEASURES, true>(task, data, rule) : quantize_into<MEASURES, false>(task, data, rule);
}

float read_factor(const Data& data, bool is_real) {
    return is_real ? *static_cast<const float*>(data.scale)
                   : as_float(get_factor<int32_t>(*static_cast<const uint8_t*>(data.scale)));
}

float read_zero(const Data& data) { return data.zero_point ? *data.zero_point : 0.0f; }

// The largest magnitude, as bits.
uint32_t find_largest(const Data& data, int64_t elements) {
    const float* __restrict x = data.x;
    const int64_t threads = std::max<int64_t>(1, std::min(data.threads, elements / FEWEST_A_THREAD));
    uint32_t largest = 0;
#pragma omp parallel for simd num_threads(threads) reduction(max : largest)
    for (int64_t i = 0; i < elements; ++i) largest = larger(largest, magnitude(x[i]));
    return largest;
}

void store_scale(const Task& task, const Data& data, uint32_t largest, bool is_real) {
    if (is_real)
        *static_cast<float*>(data.scale) = find_real_scale(task, largest);
    else
        *static_cast<uint8_t*>(data.scale) = find_exponent<int32_t>(task, largest);
}

// The ends of the range follow the kind of the format.
void store_measured(const Data& data, const Seen& seen, int64_t elements) {
    const float largest = as_float(seen.largest);
    float low = std::fmin(seen.low, 0.0f), high = std::fmax(seen.high, 0.0f);
    if (data.kind == SIGNED) low = -largest, high = largest;
    if (data.kind == UNSIGNED) high = low == -INFINITY_ ? INFINITY_ : high, low = 0;
    if (seen.largest > INFINITE) high = NAN_, low = data.kind == UNSIGNED ? 0 : NAN_;
    data.measured[0] = elements ? low : 0, data.measured[1] = elements ? high : 0;
    data.measured[2] = static_cast<float>(seen.outside) / static_cast<float>(std::max<int64_t>(1, elements));
}

void store_checked(const Data& data, const Seen& seen, bool is_real) {
    const bool is_finite = seen.largest < INFINITE;
    if (is_real)
        *static_cast<float*>(data.checked) = is_finite ? *static_cast<const float*>(data.scale) : NAN_;
    else
        *static_cast<uint8_t*>(data.checked) = is_finite ? *static_cast<const uint8_t*>(data.scale) : NAN_EXPONENT;
}

}  // namespace

extern "C" void quantize_measured(const Task* task, const Data* data, bool is_real) {
    const Rule rule{read_factor(*data, is_real), read_zero(*data), data->reach[0], data->reach[1]};
    const Seen seen = quantize_by<true>(*task, *data, rule);
    store_measured(*data, seen, count_elements(*task));
    store_checked(*data, seen, is_real);
}

extern "C" void quantize_whole(const Task* task, const Data* data, bool is_real) {
    store_scale(*task, *data, find_largest(*data, count_elements(*task)), is_real);
    quantize_by<false>(*task, *data, Rule{read_factor(*data, is_real), read_zero(*data), 0, 0});
}
