// Quantize and dequantize dense tensors in memory order; the numbers are those of runtime/references.py, bit for bit.
//
// A tensor is a list of axes, the outermost in memory first. A tile is a run of neighboring elements: the lanes. The
// rows of a tile are the elements of the same blocks along the other axes. A loop over the lanes of a row is simple
// enough for the compiler to vectorize; what differs from lane to lane stands in small arrays.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int MOST_AXES = 8;
constexpr int64_t TILE = 16384;  // elements: 64 kB of floats, which stay in the second cache between two passes
constexpr size_t MOST_STREAMS = 4;  // rows that the processor fetches ahead by itself
constexpr int64_t FEWEST_A_THREAD = 32768;
constexpr uint32_t NAN_EXPONENT = 255;
constexpr uint32_t SPREAD = 0x9E3779B1;  // neighboring indices far apart

struct Axis {
    int64_t extent, edge;      // elements, and elements of a block
    int64_t scale, logical;    // strides in the tensor of scales, and in the row-major index of the random bits
};

struct Task {
    int64_t axes;
    Axis axis[MOST_AXES];
    float lowest, largest;                      // codes
    int32_t magnitude_bits, up, down, low, high;  // the rule of power-of-two scales, see `find_exponent`
    float reach;                                // of the rule of real scales
    uint32_t site;                              // the checksum of its name
    uint32_t limit;  // magnitudes, as bits, from which a float is NaN: those of infinity and NaN, or none
};

struct Data {
    const float* x;
    const uint8_t* codes_read;
    uint8_t* codes;
    float* floats;
    void* scale;                // float or uint8_t
    const uint8_t* zero_point;  // null: 0
    const int32_t* key;         // null: to nearest
    int64_t threads;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline uint32_t mix_bits(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

inline uint32_t find_exponent(const Task& task, uint32_t bits) {
    const int32_t field = bits >> 23, mantissa = bits & 0x7FFFFF;
    const int32_t code = field + 1 - task.magnitude_bits + (mantissa > task.up) - (mantissa <= task.down);
    const int32_t clamped = code < task.low ? task.low : code > task.high ? task.high : code;
    return field == 255 ? NAN_EXPONENT : clamped;
}

inline float find_real_scale(const Task& task, uint32_t bits) {
    const float scale = as_float(bits) / task.reach;
    return bits >= 0x7F800000u ? as_float(0x7FC00000u) : scale < 0x1p-126f ? 0x1p-126f : scale;
}

inline float get_factor(uint32_t exponent) {
    return as_float(exponent == NAN_EXPONENT ? 0x7FC00000u : exponent << 23);
}

inline float get_inverse(uint32_t exponent) {  // 2^(127 - exponent), of which 2^-127 is subnormal
    return as_float(exponent == NAN_EXPONENT ? 0x7FC00000u : exponent == 254 ? 0x00400000u : (254 - exponent) << 23);
}

struct Row {
    int64_t place;
    uint32_t logical;
};

// The work space of a thread. Of a block: `value`, the exponent or the bits of the real scale, and its consequences.
struct Tile {
    std::vector<Row> rows;
    std::vector<uint32_t> largest, joined, value, index;
    std::vector<float> block_step, block_factor, block_zero, lane_step, lane_factor, lane_zero;
    const float *step, *factor, *zero;  // of each lane
    int64_t numbered_strips = -1, numbered_lanes = -1;
    // of the tile before: the place of the scale that all lanes share, and how many; -1: there was none
    int64_t only_scale = -1, only_lanes = 0;

    explicit Tile(int64_t lanes)
        : largest(lanes), joined(lanes), value(lanes), index(lanes), block_step(lanes), block_factor(lanes),
          block_zero(lanes), lane_step(lanes), lane_factor(lanes), lane_zero(lanes),
          step(lane_step.data()), factor(lane_factor.data()), zero(lane_zero.data()) {}
};

struct Plan {
    int64_t outer_axes, outer_blocks;         // axes whose blocks are walked one by one
    int64_t strips, lanes_a_strip;            // the two innermost axes: `strips` runs of the lane axis make a tile
    int64_t tiles_along, tiles_across, lanes;  // tiles of the lane axis, of the axis of strips; lanes of a full tile
    int64_t stride[MOST_AXES];
};

Plan make_plan(const Task& task) {
    Plan plan{};
    int64_t stride = 1;
    for (int64_t i = task.axes - 1; i >= 0; --i) {
        plan.stride[i] = stride;
        stride *= task.axis[i].extent;
    }
    const Axis& lane = task.axis[task.axes - 1];
    const bool joins = task.axes > 1 && task.axis[task.axes - 2].edge == 1;
    plan.outer_axes = task.axes - 1 - joins;
    plan.outer_blocks = 1;
    int64_t rows = 1;
    for (int64_t i = 0; i < plan.outer_axes; ++i) {
        plan.outer_blocks *= (task.axis[i].extent + task.axis[i].edge - 1) / task.axis[i].edge;
        rows *= task.axis[i].edge;
    }
    const int64_t most = std::max<int64_t>(64, std::min<int64_t>(2048, TILE / rows));
    const int64_t whole_blocks = std::max<int64_t>(1, most / lane.edge) * lane.edge;
    plan.lanes_a_strip = std::min(lane.extent, whole_blocks);
    plan.tiles_along = (lane.extent + plan.lanes_a_strip - 1) / plan.lanes_a_strip;
    const int64_t across = joins ? task.axis[task.axes - 2].extent : 1;
    plan.strips = plan.tiles_along > 1 ? 1 : std::min(across, std::max<int64_t>(1, most / plan.lanes_a_strip));
    plan.tiles_across = (across + plan.strips - 1) / plan.strips;
    plan.lanes = plan.strips * plan.lanes_a_strip;
    return plan;
}

// The place of one tile in the tensor, in the scales and in the row-major index.
struct Corner {
    int64_t place = 0, scale = 0;
    uint32_t logical = 0;
    int64_t strips = 1, lanes_a_strip = 0, blocks_a_strip = 0;
    int64_t strip_axis = -1;
    int64_t next = -1;  // the place of the next tile; -1: there is none
};

Corner find_corner(const Task& task, const Plan& plan, int64_t number, Tile& tile) {
    Corner corner;
    const Axis& lane = task.axis[task.axes - 1];
    const int64_t along = number % plan.tiles_along;
    number /= plan.tiles_along;
    const int64_t across = number % plan.tiles_across;
    number /= plan.tiles_across;
    const int64_t first_lane = along * plan.lanes_a_strip;
    corner.lanes_a_strip = std::min(plan.lanes_a_strip, lane.extent - first_lane);
    corner.blocks_a_strip = (corner.lanes_a_strip + lane.edge - 1) / lane.edge;
    corner.place = first_lane;
    corner.scale = first_lane / lane.edge * lane.scale;
    corner.logical = static_cast<uint32_t>(first_lane * lane.logical);
    if (plan.outer_axes < task.axes - 1) {
        const Axis& axis = task.axis[plan.outer_axes];
        const int64_t first = across * plan.strips;
        corner.strip_axis = plan.outer_axes;
        corner.strips = std::min(plan.strips, axis.extent - first);
        corner.place += first * plan.stride[plan.outer_axes];
        corner.scale += first * axis.scale;
        corner.logical += static_cast<uint32_t>(first * axis.logical);
    }
    tile.rows.assign(1, Row{0, 0});
    for (int64_t i = plan.outer_axes - 1; i >= 0; --i) {
        const Axis& axis = task.axis[i];
        const int64_t count = (axis.extent + axis.edge - 1) / axis.edge;
        const int64_t block = number % count;
        number /= count;
        corner.place += block * axis.edge * plan.stride[i];
        corner.scale += block * axis.scale;
        corner.logical += static_cast<uint32_t>(block * axis.edge * axis.logical);
        const int64_t inside = std::min(axis.edge, axis.extent - block * axis.edge);
        const size_t before = tile.rows.size();
        for (int64_t j = 1; j < inside; ++j)
            for (size_t k = 0; k < before; ++k)
                tile.rows.push_back(Row{tile.rows[k].place + j * plan.stride[i],
                                        tile.rows[k].logical + static_cast<uint32_t>(j * axis.logical)});
    }
    return corner;
}

inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t magnitude(float value) { return as_bits(value) & 0x7FFFFFFFu; }

[[gnu::noinline]] void add_row(const float* __restrict a, int64_t lanes, uint32_t* __restrict largest) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) largest[i] = larger(largest[i], magnitude(a[i]));
}

[[gnu::noinline]] void add_rows(const float* __restrict a, const float* __restrict b, const float* __restrict c,
                                const float* __restrict d, int64_t lanes, uint32_t* __restrict largest) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
        const uint32_t left = larger(magnitude(a[i]), magnitude(b[i]));
        const uint32_t right = larger(magnitude(c[i]), magnitude(d[i]));
        largest[i] = larger(largest[i], larger(left, right));
    }
}

[[gnu::noinline]] void start_rows(const float* __restrict a, const float* __restrict b, int64_t lanes,
                                  uint32_t* __restrict largest) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) largest[i] = larger(magnitude(a[i]), magnitude(b[i]));
}

void find_largest(const float* x, const Tile& tile, int64_t lanes, uint32_t* largest) {
    const std::vector<Row>& rows = tile.rows;
    start_rows(x + rows.front().place, x + rows.back().place, lanes, largest);
    size_t row = 1;
    for (; row + 4 < rows.size(); row += 4)
        add_rows(x + rows[row].place, x + rows[row + 1].place, x + rows[row + 2].place, x + rows[row + 3].place, lanes,
                 largest);
    for (; row + 1 < rows.size(); ++row) add_row(x + rows[row].place, lanes, largest);
}

// The largest of the lanes of each block; equal edges let the compiler unroll.
template <int64_t EDGE>
[[gnu::noinline]] void join_equal_lanes(const uint32_t* __restrict lane, int64_t blocks, uint32_t* __restrict block) {
    for (int64_t number = 0; number < blocks; ++number, lane += EDGE) {
        uint32_t most = 0;
        for (int64_t i = 0; i < EDGE; ++i) most = larger(most, lane[i]);
        block[number] = most;
    }
}

void join_lanes(const uint32_t* __restrict lane, const Corner& corner, int64_t edge, uint32_t* __restrict block) {
    const int64_t lanes = corner.lanes_a_strip, blocks = corner.strips * corner.blocks_a_strip;
    if (lanes % edge == 0) {
        if (edge == 4) return join_equal_lanes<4>(lane, blocks, block);
        if (edge == 8) return join_equal_lanes<8>(lane, blocks, block);
        if (edge == 16) return join_equal_lanes<16>(lane, blocks, block);
    }
    for (int64_t strip = 0; strip < corner.strips; ++strip, lane += lanes)
        for (int64_t first = 0; first < lanes; first += edge) {
            const int64_t end = std::min(first + edge, lanes);
            uint32_t most = 0;
            for (int64_t i = first; i < end; ++i) most = larger(most, lane[i]);
            *block++ = most;
        }
}

template <int64_t EDGE>
[[gnu::noinline]] void spread_equal_blocks(const float* __restrict block, int64_t blocks, float* __restrict lane) {
    for (int64_t number = 0; number < blocks; ++number, lane += EDGE) {
        const float value = block[number];
        for (int64_t i = 0; i < EDGE; ++i) lane[i] = value;
    }
}

// A number of each block, for each of the lanes.
const float* spread_blocks(const std::vector<float>& given, const Corner& corner, int64_t edge,
                           std::vector<float>& spread) {
    if (edge == 1) return given.data();
    const int64_t lanes = corner.lanes_a_strip, blocks = corner.strips * corner.blocks_a_strip;
    const float* block = given.data();
    float* lane = spread.data();
    if (lanes % edge == 0 && (edge == 4 || edge == 8 || edge == 16)) {
        if (edge == 4) spread_equal_blocks<4>(block, blocks, lane);
        if (edge == 8) spread_equal_blocks<8>(block, blocks, lane);
        if (edge == 16) spread_equal_blocks<16>(block, blocks, lane);
        return lane;
    }
    for (int64_t strip = 0; strip < corner.strips; ++strip, lane += lanes)
        for (int64_t first = 0; first < lanes; first += edge)
            std::fill(lane + first, lane + std::min(first + edge, lanes), *block++);
    return spread.data();
}

template <bool REAL>
[[gnu::noinline]] void find_values(const Task& task, int64_t blocks, const uint32_t* __restrict largest,
                                   uint32_t* __restrict value) {
    const Task rule = task;
#pragma omp simd
    for (int64_t i = 0; i < blocks; ++i)
        value[i] = REAL ? as_bits(find_real_scale(rule, largest[i])) : find_exponent(rule, largest[i]);
}

// visit(place of the scale, stride, number of the first block, blocks) for runs of blocks
template <typename Visit>
void visit_scales(const Task& task, const Corner& corner, Visit visit) {
    const int64_t along = task.axis[task.axes - 1].scale, blocks = corner.blocks_a_strip;
    const int64_t across = corner.strip_axis < 0 ? 0 : task.axis[corner.strip_axis].scale;
    if (across == along * blocks || corner.strips == 1) return visit(corner.scale, along, 0, corner.strips * blocks);
    for (int64_t strip = 0; strip < corner.strips; ++strip)
        visit(corner.scale + strip * across, along, strip * blocks, blocks);
}

template <typename Scale>
void store_scales(const Task& task, const Corner& corner, const uint32_t* value, Scale* scales) {
    const auto store = [](uint32_t bits) {
        if constexpr (sizeof(Scale) == 1) return static_cast<Scale>(bits);
        else return as_float(bits);
    };
    visit_scales(task, corner, [&](int64_t place, int64_t stride, int64_t first, int64_t blocks) {
        if (stride == 1)
            for (int64_t i = 0; i < blocks; ++i) scales[place + i] = store(value[first + i]);
        else
            for (int64_t i = 0; i < blocks; ++i) scales[place + i * stride] = store(value[first + i]);
    });
}

template <typename Scale, typename Value>
void load_scales(const Task& task, const Corner& corner, const Scale* scales, Value* value) {
    const auto load = [](Scale scale) {
        if constexpr (sizeof(Scale) == sizeof(Value)) return as_bits(scale);
        else return static_cast<Value>(scale);
    };
    visit_scales(task, corner, [&](int64_t place, int64_t stride, int64_t first, int64_t blocks) {
        if (stride == 1)
            for (int64_t i = 0; i < blocks; ++i) value[first + i] = load(scales[place + i]);
        else
            for (int64_t i = 0; i < blocks; ++i) value[first + i] = load(scales[place + i * stride]);
    });
}

template <bool REAL>
[[gnu::noinline]] void fill_factors(int64_t blocks, const uint32_t* __restrict value, float* __restrict step,
                                    float* __restrict factor) {
#pragma omp simd
    for (int64_t i = 0; i < blocks; ++i) {
        step[i] = REAL ? as_float(value[i]) : get_inverse(value[i]);
        factor[i] = REAL ? as_float(value[i]) : get_factor(value[i]);
    }
}

// Return whether all lanes of a tile have one scale, and those of the tile before had the same.
bool keeps_scale(const Task& task, const Corner& corner, Tile& tile) {
    const bool is_one = task.axis[task.axes - 1].scale == 0 &&
                        (corner.strip_axis < 0 || task.axis[corner.strip_axis].scale == 0);
    const int64_t lanes = corner.strips * corner.lanes_a_strip;
    if (is_one && tile.only_scale == corner.scale && tile.only_lanes >= lanes) return true;
    tile.only_scale = is_one ? corner.scale : -1;
    tile.only_lanes = lanes;
    return false;
}

template <bool REAL>
void prepare_scales(const Task& task, const Data& data, const Corner& corner, Tile& tile, bool finds_scale) {
    using Scale = std::conditional_t<REAL, float, uint8_t>;
    Scale* scales = static_cast<Scale*>(data.scale);
    const int64_t blocks = corner.strips * corner.blocks_a_strip, edge = task.axis[task.axes - 1].edge;
    if (!finds_scale && keeps_scale(task, corner, tile)) return;
    if (finds_scale) {
        find_largest(data.x + corner.place, tile, corner.strips * corner.lanes_a_strip, tile.largest.data());
        if (edge > 1) join_lanes(tile.largest.data(), corner, edge, tile.joined.data());
        find_values<REAL>(task, blocks, (edge > 1 ? tile.joined : tile.largest).data(), tile.value.data());
        store_scales(task, corner, tile.value.data(), scales);
    } else {
        load_scales(task, corner, scales, tile.value.data());
    }
    fill_factors<REAL>(blocks, tile.value.data(), tile.block_step.data(), tile.block_factor.data());
    if (data.x) tile.step = spread_blocks(tile.block_step, corner, edge, tile.lane_step);
    if (data.floats) tile.factor = spread_blocks(tile.block_factor, corner, edge, tile.lane_factor);
    if (data.zero_point) {
        load_scales(task, corner, data.zero_point, tile.block_zero.data());
        tile.zero = spread_blocks(tile.block_zero, corner, edge, tile.lane_zero);
    }
}

// The index of each lane, counted from the corner: the same in all tiles of one shape.
void number_lanes(const Task& task, const Corner& corner, Tile& tile) {
    if (tile.numbered_strips == corner.strips && tile.numbered_lanes == corner.lanes_a_strip) return;
    tile.numbered_strips = corner.strips, tile.numbered_lanes = corner.lanes_a_strip;
    const uint32_t along = static_cast<uint32_t>(task.axis[task.axes - 1].logical);
    const uint32_t across = corner.strip_axis < 0 ? 0 : static_cast<uint32_t>(task.axis[corner.strip_axis].logical);
    for (int64_t strip = 0; strip < corner.strips; ++strip) {
        uint32_t* __restrict index = tile.index.data() + strip * corner.lanes_a_strip;
#pragma omp simd
        for (int64_t i = 0; i < corner.lanes_a_strip; ++i)
            index[i] = (static_cast<uint32_t>(strip) * across + static_cast<uint32_t>(i) * along) * SPREAD;
    }
}

template <bool REAL, bool STOCHASTIC, bool CODES, bool FLOATS>
[[gnu::noinline]] void write_row(const Task& task, const Tile& tile, int64_t lanes, const float* __restrict x,
               uint32_t seed, uint8_t* __restrict codes, float* __restrict floats) {
    const float lowest = task.lowest, largest = task.largest;
    const uint32_t limit = task.limit;
    const float* __restrict step = tile.step;
    const float* __restrict factor = tile.factor;
    const float* __restrict zero = tile.zero;
    const uint32_t* __restrict index = tile.index.data();
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
        const float real = REAL ? x[i] / step[i] : x[i] * step[i];
        float rounded;
        if constexpr (STOCHASTIC) {
            const float floor = std::floor(real);
            const float threshold = (real - floor) * 0x1p24f;
            const float number = static_cast<float>(static_cast<int32_t>(mix_bits(seed + index[i]) >> 8));
            rounded = floor + (number < threshold ? 1.0f : 0.0f);
        } else {
            rounded = std::rint(real);
        }
        rounded = (rounded == rounded ? rounded : 0.0f) + zero[i];
        rounded = rounded > lowest ? rounded : lowest;
        rounded = rounded < largest ? rounded : largest;
        const int32_t code = static_cast<int32_t>(rounded);
        if (CODES) codes[i] = static_cast<uint8_t>(code);
        if (FLOATS) {
            const float value = (static_cast<float>(code) - zero[i]) * factor[i];
            // by bits: the compiler does not vectorize a choice of floats here
            const uint32_t keeps = magnitude(x[i]) >= limit ? 0 : ~0u;
            floats[i] = as_float((as_bits(value) & keeps) | (0x7FC00000u & ~keeps));
        }
    }
}

// Fetch a row of the next tile while this one is written: with 16 rows, half of the time was waiting for memory.
inline void prefetch(const float* row, int64_t lanes) {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < lanes * 4; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

template <bool REAL, bool STOCHASTIC, bool CODES, bool FLOATS>
void write_rows(const Task& task, const Data& data, const Corner& corner, const Tile& tile, uint32_t seed) {
    const int64_t lanes = corner.strips * corner.lanes_a_strip;
    for (const Row& row : tile.rows) {
        const int64_t place = corner.place + row.place;
        if (corner.next >= 0 && tile.rows.size() > MOST_STREAMS) prefetch(data.x + corner.next + row.place, lanes);
        write_row<REAL, STOCHASTIC, CODES, FLOATS>(task, tile, lanes, data.x + place,
                                                   seed + (corner.logical + row.logical) * SPREAD, data.codes + place,
                                                   data.floats + place);
    }
}

template <typename Work>
void run_tiles(const Task& task, int64_t threads, Work work) {
    int64_t elements = 1;
    for (int64_t i = 0; i < task.axes; ++i) elements *= task.axis[i].extent;
    if (elements == 0) return;
    const Plan plan = make_plan(task);
    const int64_t tiles = plan.outer_blocks * plan.tiles_across * plan.tiles_along;
    const int64_t useful = std::max<int64_t>(1, std::min({threads, tiles, elements / FEWEST_A_THREAD}));
#pragma omp parallel num_threads(useful)
    {
        Tile tile(plan.lanes);
#pragma omp for
        for (int64_t number = 0; number < tiles; ++number) {
            const Corner next = find_corner(task, plan, std::min(number + 1, tiles - 1), tile);
            Corner corner = find_corner(task, plan, number, tile);
            if (number + 1 < tiles) corner.next = next.place;
            work(corner, tile);
        }
    }
}

template <bool REAL, bool STOCHASTIC, bool CODES, bool FLOATS>
void quantize(const Task& task, const Data& data, bool finds_scale) {
    const uint32_t seed = STOCHASTIC ? mix_bits(mix_bits(static_cast<uint32_t>(data.key[0]) ^ task.site) ^
                                                static_cast<uint32_t>(data.key[1]))
                                     : 0;
    run_tiles(task, data.threads, [&](const Corner& corner, Tile& tile) {
        prepare_scales<REAL>(task, data, corner, tile, finds_scale);
        if (STOCHASTIC) number_lanes(task, corner, tile);
        write_rows<REAL, STOCHASTIC, CODES, FLOATS>(task, data, corner, tile, seed);
    });
}

template <bool REAL, bool STOCHASTIC>
void quantize_into(const Task& task, const Data& data, bool finds_scale) {
    if (data.codes && data.floats)
        quantize<REAL, STOCHASTIC, true, true>(task, data, finds_scale);
    else if (data.codes)
        quantize<REAL, STOCHASTIC, true, false>(task, data, finds_scale);
    else
        quantize<REAL, STOCHASTIC, false, true>(task, data, finds_scale);
}

template <bool REAL, bool SIGNED>
void dequantize(const Task& task, const Data& data) {
    run_tiles(task, data.threads, [&](const Corner& corner, Tile& tile) {
        prepare_scales<REAL>(task, data, corner, tile, false);
        const int64_t lanes = corner.strips * corner.lanes_a_strip;
        const float* __restrict factor = tile.factor;
        const float* __restrict zero = tile.zero;
        for (const Row& row : tile.rows) {
            const uint8_t* __restrict codes = data.codes_read + corner.place + row.place;
            float* __restrict floats = data.floats + corner.place + row.place;
#pragma omp simd
            for (int64_t i = 0; i < lanes; ++i) {
                const int32_t code = SIGNED ? static_cast<int8_t>(codes[i]) : codes[i];
                floats[i] = (static_cast<float>(code) - zero[i]) * factor[i];
            }
        }
    });
}

}  // namespace

extern "C" void quantize_blocks(const Task* task, const Data* data, bool is_real, bool finds_scale) {
    if (is_real)
        data->key ? quantize_into<true, true>(*task, *data, finds_scale)
                  : quantize_into<true, false>(*task, *data, finds_scale);
    else
        data->key ? quantize_into<false, true>(*task, *data, finds_scale)
                  : quantize_into<false, false>(*task, *data, finds_scale);
}

extern "C" void dequantize_blocks(const Task* task, const Data* data, bool is_real, bool is_signed) {
    if (is_real)
        is_signed ? dequantize<true, true>(*task, *data) : dequantize<true, false>(*task, *data);
    else
        is_signed ? dequantize<false, true>(*task, *data) : dequantize<false, false>(*task, *data);
}
