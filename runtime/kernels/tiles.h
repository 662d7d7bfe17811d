// The order in which quantizers walk through a dense tensor.
//
// A tensor is a list of axes, the outermost in memory first. A tile is a run of neighboring elements: the lanes. The
// rows of a tile are the elements of the same blocks along the other axes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int MOST_AXES = 8;
constexpr int64_t TILE = 16384;  // elements: 64 kB of floats, which stay in the second cache between two passes
constexpr int64_t FEWEST_A_THREAD = 32768;
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

inline int64_t count_elements(const Task& task) {
    int64_t elements = 1;
    for (int64_t i = 0; i < task.axes; ++i) elements *= task.axis[i].extent;
    return elements;
}

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

inline uint32_t make_seed(const Task& task, const int32_t* key) {
    return mix_bits(mix_bits(static_cast<uint32_t>(key[0]) ^ task.site) ^ static_cast<uint32_t>(key[1]));
}

inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t magnitude(float value) { return as_bits(value) & 0x7FFFFFFFu; }

struct Row {
    int64_t place;
    uint32_t logical;
};

// The work space of a thread that walks through tiles.
struct Walk {
    std::vector<Row> rows;
    std::vector<uint32_t> index;
    int64_t numbered_strips = -1, numbered_lanes = -1;

    explicit Walk(int64_t lanes) : index(lanes) {}
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
    int64_t ahead = 0;  // from this place to that of the next tile; 0: there is none

    int64_t count_lanes() const { return strips * lanes_a_strip; }
};

Corner find_corner(const Task& task, const Plan& plan, int64_t number, Walk& tile) {
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

// The index of each lane, counted from the corner: the same in all tiles of one shape.
void number_lanes(const Task& task, const Corner& corner, Walk& tile) {
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

// work(corner, space) for every tile, with a work space for each thread, which join(space) sees at the end
template <typename Space, typename Work, typename Join>
void run_tiles(const Task& task, int64_t threads, Work work, Join join) {
    const int64_t elements = count_elements(task);
    if (elements == 0) return;
    const Plan plan = make_plan(task);
    const int64_t tiles = plan.outer_blocks * plan.tiles_across * plan.tiles_along;
    const int64_t useful = std::max<int64_t>(1, std::min({threads, tiles, elements / FEWEST_A_THREAD}));
#pragma omp parallel num_threads(useful)
    {
        Space space(plan.lanes);
#pragma omp for
        for (int64_t number = 0; number < tiles; ++number) {
            const Corner next = find_corner(task, plan, std::min(number + 1, tiles - 1), space);
            Corner corner = find_corner(task, plan, number, space);
            corner.ahead = next.place - corner.place;
            work(corner, space);
        }
#pragma omp critical
        join(space);
    }
}

}  // namespace
