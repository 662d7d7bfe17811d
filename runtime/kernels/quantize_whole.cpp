// Quantize a dense tensor with one scale: by a scale that is known, while measuring what a range of the past learns, or
// by one that is found in a pass of its own. Large blocks that follow each other in memory are such tensors, one after
// the other. The numbers are those of runtime/references.py, bit for bit.

#include "tiles.h"
#include "scales.h"
#include "reals.h"
#include "groups.h"

namespace {

constexpr float INFINITY_ = __builtin_inff(), NAN_ = __builtin_nanf("");

enum Kind : int64_t { SIGNED, UNSIGNED, AFFINE };  // of the format: what its range is made of

struct Data {
    Reals x, floats;            // null: not wanted
    uint8_t* codes;             // null: not wanted
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

// The work space of a thread; lanes have equal scales, with room for a whole group behind the last one.
struct Space : Walk {
    Seen seen;
    bool is_filled = false;
    std::vector<float> step, factor, zero, x, floats;  // the last two: copies of a row

    explicit Space(int64_t lanes)
        : Walk(lanes + GROUP), step(lanes + GROUP), factor(lanes + GROUP), zero(lanes + GROUP), x(lanes), floats(lanes) {}

    void fill(float value, float origin) {
        if (std::exchange(is_filled, true)) return;
        std::fill(step.begin(), step.end(), 1 / value);
        std::fill(factor.begin(), factor.end(), value);
        std::fill(zero.begin(), zero.end(), origin);
    }
};

// The numbers of the quantizer.
struct Rule {
    float factor, zero, low, high;
};

[[gnu::noinline]] void measure_row(const float* __restrict x, int64_t lanes, const Rule& rule, Seen& seen) {
    const float reach_low = rule.low, reach_high = rule.high;
    float low = seen.low, high = seen.high;
    uint32_t largest = seen.largest;
    int32_t outside = 0;
#pragma omp simd reduction(min : low) reduction(max : high, largest) reduction(+ : outside)
    for (int64_t i = 0; i < lanes; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        largest = larger(largest, magnitude(x[i]));
        outside += (x[i] < reach_low) | (x[i] > reach_high);
    }
    seen.add(Seen{low, high, largest, outside});
}

// `logical`: the row-major index of the first element.
Seen quantize(const Task& task, const Data& data, const Rule& rule, bool is_real, bool measures, uint32_t logical = 0) {
    const uint32_t seed = data.key ? make_seed(task, data.key) : 0;
    const WriteRow write = choose_row(data, is_real || data.zero_point);
    Seen all;
    const auto work = [&](const Corner& corner, Space& space) {
        const int64_t lanes = corner.count_lanes();
        if (data.key) number_lanes(task, corner, space);
        const float* x = read_row(data.x, corner.place, lanes, space.x.data());
        if (measures) measure_row(x, lanes, rule, space.seen);
        space.fill(rule.factor, rule.zero);
        const Lanes lane{space.step.data(), space.factor.data(), space.zero.data(), space.index.data()};
        const Target row{x, data.codes + corner.place, data.floats.find_row(corner.place, space.floats.data()),
                         seed + (logical + corner.logical) * SPREAD};
        write_lanes(write, task, lane, lanes, corner.ahead, row, data.codes, data.floats.data);
        if (data.floats.data) write_copy(data.floats, corner.place, lanes, space.floats.data());
    };
    run_tiles<Space>(task, data.threads, work, [&](const Space& space) { all.add(space.seen); });
    return all;
}

float read_factor(const Data& data, bool is_real) {
    return is_real ? *static_cast<const float*>(data.scale)
                   : as_float(get_factor<int32_t>(*static_cast<const uint8_t*>(data.scale)));
}

// The same from an element and a scale on.
Data move(const Data& data, int64_t elements, int64_t scale, bool is_real) {
    Data part = data;
    for (Reals* one : {&part.x, &part.floats})
        if (one->data) one->data = one->is_short ? static_cast<void*>(one->find_short(elements)) : one->find_float(elements);
    if (part.codes) part.codes += elements;
    part.scale = static_cast<uint8_t*>(data.scale) + scale * (is_real ? sizeof(float) : 1);
    return part;
}

float read_zero(const Data& data) { return data.zero_point ? *data.zero_point : 0.0f; }

// The largest magnitude, as bits.
uint32_t find_largest(const Data& data, int64_t elements) {
    const int64_t threads = std::max<int64_t>(1, std::min(data.threads, elements / FEWEST_A_THREAD));
    if (data.x.is_short) {
        const uint16_t* __restrict x = data.x.find_short(0);
        uint16_t largest = 0;
#pragma omp parallel for simd num_threads(threads) reduction(max : largest)
        for (int64_t i = 0; i < elements; ++i) largest = std::max<uint16_t>(largest, x[i] & 0x7FFF);
        return static_cast<uint32_t>(largest) << 16;
    }
    const float* __restrict x = data.x.find_float(0);
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
    const Seen seen = quantize(*task, *data, rule, is_real, true);
    store_measured(*data, seen, count_elements(*task));
    store_checked(*data, seen, is_real);
}

extern "C" void quantize_whole(const Task* given, const Data* data, bool is_real) {
    Task task = *given;
    Axis& outer = task.axis[0];
    const Axis all = outer;
    const int64_t inner = count_elements(task) / std::max<int64_t>(1, all.extent), step = all.scale ? all.edge : all.extent;
    int64_t first = 0, scale = 0;
    outer.edge = 1, outer.scale = 0;
    do {  // an empty tensor has a scale too
        outer.extent = std::min(step, all.extent - first);
        const Data part = move(*data, first * inner, scale, is_real);
        store_scale(task, part, find_largest(part, count_elements(task)), is_real);
        quantize(task, part, Rule{read_factor(part, is_real), 0, 0, 0}, is_real, false, static_cast<uint32_t>(first * all.logical));
        first += step, scale += all.scale;
    } while (first < all.extent);
}
