// Quantize and dequantize dense tensors in memory order; the numbers are those of runtime/references.py, bit for bit.

#include "tiles.h"
#include "scales.h"
#include "reals.h"
#include "groups.h"
#include "eights.h"
#include "blocks.h"
#include "packing.h"

namespace {

constexpr int64_t AHEAD = 2048;  // floats from what is read to what is fetched
constexpr size_t FEW_ROWS = 4;   // that the processor, and one fetch for each, can keep up with

// The scales of the eight blocks of a group, as bits, and what each lane needs of them.
inline void find_group(const Task& task, const Target* target, size_t rows, uint32_t* value, float* step, float* factor) {
    Eight largest[8]{};
    for (size_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < 8; ++i) largest[i] = choose_larger(largest[i], load_magnitudes(target[row].x + 8 * i));
    const EightSigned found = find_exponent(task, (EightSigned)join_eights(largest));
    store_eight(found, value);
    spread_eights(get_inverse(found), step);
    spread_eights(get_factor(found), factor);
}

// Writes the rows of a tile of whole groups, each of which goes through the registers once.
template <bool STOCHASTIC, bool CODES, bool FLOATS>
[[gnu::noinline]] void write_groups(const Task& task, const uint32_t* index, int64_t groups, Target* target, size_t rows,
                                    uint32_t* value) {
    alignas(64) float step[GROUP], factor[GROUP];
    for (; groups > 0; --groups, index += GROUP, value += 8) {
        find_group(task, target, rows, value, step, factor);
        for (size_t row = 0; row < rows; ++row) {
            fetch_group(target[row].x + AHEAD);
            write_group<false, STOCHASTIC, CODES, FLOATS>(task, Lanes{step, factor, nullptr, index}, target[row]);
            target[row] = target[row] + GROUP;
        }
    }
}

using WriteGroups = void (*)(const Task& task, const uint32_t* index, int64_t groups, Target* target, size_t rows,
                             uint32_t* value);

template <bool STOCHASTIC>
WriteGroups choose_groups(const Data& data) {
    if (!data.floats.data) return write_groups<STOCHASTIC, true, false>;
    return data.codes ? write_groups<STOCHASTIC, true, true> : write_groups<STOCHASTIC, false, true>;
}

// One call; `task` is that of a part, if codes are packed.
struct Job {
    const Task& task;
    const Data& data;
    bool is_real, finds_scale;
    WriteRow write_row;
    WriteGroups write_groups;
    uint32_t seed;

    Job(const Task& task, const Data& data, bool is_real, bool finds_scale)
        : task(task), data(data), is_real(is_real), finds_scale(finds_scale),
          write_row(choose_row(data, is_real || data.zero_point)),
          write_groups(data.key ? choose_groups<true>(data) : choose_groups<false>(data)),
          seed(data.key ? make_seed(task, data.key) : 0) {}
};

// Where a row of a tile goes: codes that are packed wait beside those of the other parts.
Target find_target(const Job& job, const Corner& corner, Tile& tile, size_t row, int64_t part) {
    const auto [inside, logical] = tile.rows[row];
    const int64_t place = corner.place + inside, parts = job.data.parts, lanes = corner.count_lanes();
    uint8_t* codes = parts > 1 ? tile.codes.data() + (row * parts + part) * lanes : job.data.codes + place;
    float* floats = job.data.floats.find_row(place, tile.floats.data() + row * lanes);
    return {tile.x[row], codes, floats, job.seed + (corner.logical + logical) * SPREAD};
}

void write_rows(const Job& job, const Corner& corner, Tile& tile, int64_t part) {
    const Lanes lane{tile.step, tile.factor, tile.zero, tile.index.data()};
    for (size_t row = 0; row < tile.rows.size(); ++row)
        write_lanes(job.write_row, job.task, lane, corner.count_lanes(), corner.ahead,
                    find_target(job, corner, tile, row, part), job.data.codes, job.data.floats.data);
}

// Return whether each group can go through the registers at once: blocks of eight lanes, in few rows.
bool has_groups(const Job& job, const Corner& corner, const Tile& tile) {
    return job.finds_scale && !job.is_real && job.task.axis[job.task.axes - 1].edge == 8 &&
           tile.rows.size() <= FEW_ROWS && corner.lanes_a_strip % 8 == 0 && corner.count_lanes() % GROUP == 0;
}

void write_codes(const Job& job, const Corner& corner, Tile& tile, int64_t part) {
    if (has_groups(job, corner, tile)) {
        Target target[FEW_ROWS];
        for (size_t row = 0; row < tile.rows.size(); ++row) target[row] = find_target(job, corner, tile, row, part);
        job.write_groups(job.task, tile.index.data(), corner.count_lanes() / GROUP, target, tile.rows.size(),
                         tile.value.data());
        return store_scales(job.task, corner, tile.value.data(), static_cast<uint8_t*>(job.data.scale));
    }
    if (job.is_real)
        prepare_scales<true>(job.task, job.data, corner, tile, job.finds_scale);
    else
        prepare_scales<false>(job.task, job.data, corner, tile, job.finds_scale);
    write_rows(job, corner, tile, part);
}

void write_tile(const Job& job, const Corner& corner, Tile& tile, int64_t part) {
    const int64_t lanes = corner.count_lanes();
    read_rows(job.data, corner, tile);
    write_codes(job, corner, tile, part);
    if (!job.data.floats.data) return;
    for (size_t row = 0; row < tile.rows.size(); ++row)
        write_copy(job.data.floats, corner.place + tile.rows[row].place, lanes, tile.floats.data() + row * lanes);
}

// The first part of a tensor, whose codes share bytes with those of the other parts; axis 0 divides evenly.
Task take_part(Task task, int64_t parts) {
    task.axis[0].extent /= parts;
    return task;
}

// The same tile of another part.
Corner move_corner(const Task& first, Corner corner, int64_t part) {
    const Axis& axis = first.axis[0];
    const int64_t extent = part * axis.extent;
    corner.place += part * count_elements(first);
    corner.scale += extent / axis.edge * axis.scale;
    corner.logical += static_cast<uint32_t>(extent * axis.logical);
    return corner;
}

void pack_tile(const Data& data, const Corner& corner, const Tile& tile) {
    const Parts parts{1, 1, corner.count_lanes(), data.parts};
    const uint8_t* codes = tile.codes.data();
    for (const Row& row : tile.rows) {
        pack_codes(&parts, codes, data.codes + corner.place + row.place);
        codes += parts.parts * parts.inner;
    }
}

template <bool REAL>
void dequantize(const Task& task, const Data& data, bool is_signed) {
    const Task first = take_part(task, data.parts);
    const int32_t width = 8 / data.parts, mask = (1 << width) - 1, sign = is_signed ? 1 << (width - 1) : 0;
    run_tiles<Tile>(first, data.threads, [&](const Corner& packed, Tile& tile) {
        for (int64_t part = 0; part < data.parts; ++part) {
            const Corner corner = move_corner(first, packed, part);
            const int32_t shift = part * width;
            prepare_scales<REAL>(first, data, corner, tile, false);
            const int64_t lanes = corner.count_lanes();
            const float* __restrict factor = tile.factor;
            const float* __restrict zero = tile.zero;
            if (data.floats.is_short) tile.floats.resize(lanes);
            for (const Row& row : tile.rows) {
                const uint8_t* __restrict codes = data.codes_read + packed.place + row.place;
                float* __restrict floats = data.floats.find_row(corner.place + row.place, tile.floats.data());
#pragma omp simd
                for (int64_t i = 0; i < lanes; ++i) {
                    const int32_t code = (((codes[i] >> shift) & mask) ^ sign) - sign;
                    floats[i] = (static_cast<float>(code) - zero[i]) * factor[i];
                }
                write_copy(data.floats, corner.place + row.place, lanes, tile.floats.data());
            }
        }
    }, [](const Tile&) {});
}

}  // namespace

extern "C" void quantize_blocks(const Task* task, const Data* data, bool is_real, bool finds_scale) {
    const Task first = take_part(*task, data->parts);
    const Job job(first, *data, is_real, finds_scale);
    run_tiles<Tile>(first, data->threads, [&](const Corner& corner, Tile& tile) {
        if (data->key) number_lanes(first, corner, tile);
        if (data->parts > 1) tile.codes.resize(tile.rows.size() * data->parts * corner.count_lanes());
        for (int64_t part = 0; part < data->parts; ++part) write_tile(job, move_corner(first, corner, part), tile, part);
        if (data->parts > 1) pack_tile(*data, corner, tile);
    }, [](const Tile&) {});
}

extern "C" void dequantize_blocks(const Task* task, const Data* data, bool is_real, bool is_signed) {
    (is_real ? dequantize<true> : dequantize<false>)(*task, *data, is_signed);
}
