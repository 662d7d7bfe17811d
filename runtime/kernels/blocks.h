// The scales of the blocks of a tile, found or read, and what each lane needs of them.
//
// A loop over the lanes of a row is simple enough for the compiler to vectorize; what differs from lane to lane stands in
// small arrays.

namespace {

struct Data {
    Reals x, floats;            // null: not wanted, or not there
    const uint8_t* codes_read;
    uint8_t* codes;
    void* scale;                // float or uint8_t
    const uint8_t* zero_point;  // null: 0
    const int32_t* key;         // null: to nearest
    int64_t threads;
    int64_t parts;              // codes in a byte of `codes`, or of `codes_read`: 1, 2 or 4
};

// The work space of a thread. Of a block: `value`, the exponent or the bits of the real scale, and its consequences.
struct Tile : Walk {
    std::vector<uint32_t> largest, joined, value;
    std::vector<float> block_step, block_factor, block_zero, lane_step, lane_factor, lane_zero;
    const float *step, *factor, *zero;  // of each lane
    std::vector<uint8_t> codes;         // before they are packed: of each row, those of each part
    std::vector<const float*> x;        // each row
    std::vector<float> wide, floats;    // copies of the rows, one after the other, of bfloat16 alone
    // of the tile before: the place of the scale that all lanes share, and how many; -1: there was none
    int64_t only_scale = -1, only_lanes = 0;

    // room for a whole group behind the last lane
    explicit Tile(int64_t lanes)
        : Walk(lanes + GROUP), largest(lanes), joined(lanes), value(lanes), block_step(lanes + GROUP),
          block_factor(lanes + GROUP), block_zero(lanes + GROUP), lane_step(lanes + GROUP),
          lane_factor(lanes + GROUP), lane_zero(lanes + GROUP), step(lane_step.data()),
          factor(lane_factor.data()), zero(lane_zero.data()) {}
};

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

// Let the tile know where its rows are read, and make room for those that are written.
void read_rows(const Data& data, const Corner& corner, Tile& tile) {
    const int64_t lanes = corner.count_lanes();
    const size_t rows = tile.rows.size();
    tile.x.resize(rows);
    if (data.x.is_short) tile.wide.resize(rows * lanes);
    if (data.floats.is_short) tile.floats.resize(rows * lanes);
    for (size_t row = 0; row < rows; ++row)
        tile.x[row] = read_row(data.x, corner.place + tile.rows[row].place, lanes, tile.wide.data() + row * lanes);
}

void find_largest(const std::vector<const float*>& x, int64_t lanes, uint32_t* largest) {
    start_rows(x.front(), x.back(), lanes, largest);
    size_t row = 1;
    for (; row + 4 < x.size(); row += 4) add_rows(x[row], x[row + 1], x[row + 2], x[row + 3], lanes, largest);
    for (; row + 1 < x.size(); ++row) add_row(x[row], lanes, largest);
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
        value[i] = REAL ? as_bits(find_real_scale(rule, largest[i])) : find_exponent<int32_t>(rule, largest[i]);
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
        step[i] = as_float(REAL ? value[i] : get_inverse<int32_t>(value[i]));
        factor[i] = as_float(REAL ? value[i] : get_factor<int32_t>(value[i]));
    }
}

// Return whether all lanes of a tile have one scale, and those of the tile before had the same.
bool keeps_scale(const Task& task, const Corner& corner, Tile& tile) {
    const bool is_one = task.axis[task.axes - 1].scale == 0 &&
                        (corner.strip_axis < 0 || task.axis[corner.strip_axis].scale == 0);
    const int64_t lanes = corner.count_lanes();
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
        find_largest(tile.x, corner.count_lanes(), tile.largest.data());
        if (edge > 1) join_lanes(tile.largest.data(), corner, edge, tile.joined.data());
        find_values<REAL>(task, blocks, (edge > 1 ? tile.joined : tile.largest).data(), tile.value.data());
        store_scales(task, corner, tile.value.data(), scales);
    } else {
        load_scales(task, corner, scales, tile.value.data());
    }
    fill_factors<REAL>(blocks, tile.value.data(), tile.block_step.data(), tile.block_factor.data());
    if (data.x.data) tile.step = spread_blocks(tile.block_step, corner, edge, tile.lane_step);
    const bool divides = REAL || data.zero_point;
    if (data.floats.data || divides) tile.factor = spread_blocks(tile.block_factor, corner, edge, tile.lane_factor);
    if (data.zero_point) {
        load_scales(task, corner, data.zero_point, tile.block_zero.data());
        tile.zero = spread_blocks(tile.block_zero, corner, edge, tile.lane_zero);
    }
}

}  // namespace
