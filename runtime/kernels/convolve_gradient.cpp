// Weight gradients of convolutions of int8 codes, without a copy of what each position reads.
//
//     g[r, c, tap] = float(Σ (a[r, p] − a's zero)·(x[p, k] − x's zero)) · min(a's factor, x's factor) · max(…)
//
// Sums run over positions p of all samples and are exact: in int32 those of a batch of positions, and all of them if they
// fit, or else in int64. Codes are packed so that vpdpbusd reads 4 neighbors of a row of positions: once for a, and for x
// once for every tap of a row, as a tap moves the neighbors. Taps along the other dimensions read the same copy from
// another row on. For the zero points, with u = a + 128 unsigned:
//     Σ (u − p)·(s − q) = Σ u·s − p·Σ s − q·Σ u + positions·p·q.
#include "codes.h"
#include "images.h"

#include <vector>

#ifndef __AVX512VNNI__
extern "C" void convolve_gradient() {}
extern "C" void count_scratch() {}
#else

namespace {

constexpr int64_t UNIT = 1024;   // positions at most of one sample that are packed as one stretch
constexpr int64_t BATCH = 2048;  // positions at most that are packed at a time: they stay in the second cache
constexpr int64_t PIECE = 8192;  // quads of a unit at most whose sums stay in int32: 4·8192·255·128 is half of it
constexpr int64_t MOST = 33025;  // positions whose products, of at most 255², int32 holds
constexpr int ROWS = 8, VECTORS = 3;

struct Call {
  Image a, x;  // unsigned and signed after the copy
  Windows windows;
  Values a_scale, a_point;   // of rows
  Values x_scale;            // of channels
  Values x_point;            // one value
  int64_t is_channels_last;  // whether the channels of a tap lie side by side, or the taps of a channel
  int64_t is_added;          // to the result, instead of written
  int64_t threads;
  uint8_t *scratch;
  float *result;  // [rows, channels, taps]
};

// Sizes that follow from a call. A unit is some rows of positions of a sample.
struct Plan {
  int64_t row_groups, groups, columns;   // of 16 rows; of 16 channels; vectors of 16 columns
  int64_t quads, rows, chunks, units, batch;  // of a row of positions; of a unit; of a sample; of all; at a time
  int64_t a_unit, x_unit, x_turn;        // quads of a unit; rows of x that have the same remainder by the step
  int64_t a_line, x_line;                // bytes of a copied row
  int64_t a_bytes, x_bytes, sum_bytes;
  bool is_wide;                          // whether sums are int64
};

int64_t count_positions(const Call &call) {
  return call.a.samples * call.windows.count[0] * call.windows.count[1] * call.windows.count[2];
}

Plan make_plan(const Call &call) {
  const Windows &win = call.windows;
  Plan plan{};
  plan.row_groups = divide_up(call.a.channels, LANES);
  plan.groups = divide_up(call.x.channels, LANES);
  plan.columns = win.taps[0] * win.taps[1] * win.taps[2] * plan.groups;
  plan.quads = divide_up(win.count[2], FOUR);
  const int64_t most = std::clamp<int64_t>(UNIT / (plan.quads * FOUR), 1, win.count[1]);
  plan.chunks = divide_up(win.count[1], most);
  plan.rows = divide_up(win.count[1], plan.chunks);
  plan.units = call.a.samples * win.count[0] * plan.chunks;
  plan.batch = std::clamp<int64_t>(BATCH / (plan.rows * plan.quads * FOUR), 1, plan.units);
  plan.x_turn = divide_up(win.reach(1, plan.rows), win.step[1]);
  plan.a_unit = plan.rows * plan.quads;
  plan.x_unit = plan.x_turn * win.step[1] * plan.quads;
  plan.a_line = plan.quads * FOUR * plan.row_groups * LANES;
  plan.x_line = win.reach(2, win.count[2]) * plan.groups * LANES;
  plan.a_bytes = plan.row_groups * plan.batch * plan.a_unit * LANES * FOUR;
  plan.x_bytes = win.taps[0] * win.taps[2] * plan.groups * plan.batch * plan.x_unit * LANES * FOUR;
  plan.is_wide = count_positions(call) > MOST;
  plan.sum_bytes = plan.row_groups * LANES * plan.columns * LANES * (plan.is_wide ? 8 : 4);
  return plan;
}

// The place of a unit: a sample, a slice of positions, and the first row.
struct Place {
  int64_t sample, depth, first, rows;
};

Place find_place(const Call &call, const Plan &plan, int64_t unit) {
  const int64_t first = unit % plan.chunks * plan.rows, outer = unit / plan.chunks;
  const int64_t rows = std::min(plan.rows, call.windows.count[1] - first);
  return {outer / call.windows.count[0], outer % call.windows.count[0], first, rows};
}

// The signed byte of zero, between the codes of x.
int32_t get_x_point(const Call &call) { return call.x_point.get_point(0) - int32_t(call.x.flip); }

struct Scratch {
  uint8_t *a;
  int8_t *x;
  uint8_t *sums;     // [rows, columns, 16]
  int32_t *totals;   // [columns, 16]: Σ s
  int32_t *of_rows;  // [rows]: Σ u
  float *factors;    // [groups, 16]: of the channels
  uint8_t *line;     // of each thread
};

// Pack 4 positions of 16 channels; `count` of them are there.
INLINE __m512i read_four(const uint8_t *line, int64_t step, int64_t count) {
  __m128i four[FOUR];
  for (int64_t j = 0; j < FOUR; ++j)
    four[j] = j < count ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(line + j * step)) : _mm_setzero_si128();
  return interleave(four);
}

void pack_a(const Call &call, const Plan &plan, const Scratch &to, const Place &place, int64_t at, uint8_t *line) {
  const int64_t pitch = plan.row_groups * LANES, count = call.windows.count[2];
  for (int64_t row = 0; row < place.rows; ++row) {
    copy_row(call.a, 0, place.sample, place.depth, place.first + row, 0, count, pitch, line);
    for (int64_t group = 0; group < plan.row_groups; ++group) {
      uint8_t *packed = to.a + ((group * plan.batch + at) * plan.a_unit + row * plan.quads) * LANES * FOUR;
      for (int64_t i = 0; i < count; i += FOUR, packed += LANES * FOUR)
        _mm512_storeu_si512(packed, read_four(line + i * pitch + group * LANES, pitch, count - i));
    }
  }
}

void pack_x(const Call &call, const Plan &plan, const Scratch &to, const Place &place, int64_t at, uint8_t *line) {
  const Windows &win = call.windows;
  const int64_t pitch = plan.groups * LANES, length = win.reach(2, win.count[2]), count = win.count[2];
  const int32_t zero = get_x_point(call);
  for (int64_t slice = 0; slice < win.taps[0]; ++slice)
    for (int64_t row = 0; row < win.reach(1, place.rows); ++row) {
      const int64_t depth = win.start[0] + place.depth * win.step[0] + slice * win.dilation[0];
      copy_row(call.x, zero, place.sample, depth, win.start[1] + place.first * win.step[1] + row, win.start[2], length, pitch,
               line);
      const int64_t turned = row % win.step[1] * plan.x_turn + row / win.step[1];
      for (int64_t tap = 0; tap < win.taps[2]; ++tap)
        for (int64_t group = 0; group < plan.groups; ++group) {
          const int64_t copy = (slice * win.taps[2] + tap) * plan.groups + group;
          int8_t *packed = to.x + ((copy * plan.batch + at) * plan.x_unit + turned * plan.quads) * LANES * FOUR;
          const uint8_t *from = line + tap * win.dilation[2] * pitch + group * LANES;
          for (int64_t i = 0; i < count; i += FOUR, packed += LANES * FOUR)
            _mm512_storeu_si512(packed, read_four(from + i * win.step[2] * pitch, win.step[2] * pitch, count - i));
        }
    }
}

// A vector of columns is 16 channels of one tap: where its codes begin, in order of channels, then of taps.
const int8_t *find_column(const Call &call, const Plan &plan, const Scratch &from, int64_t column) {
  const Windows &win = call.windows;
  const int64_t group = column % plan.groups, tap = column / plan.groups % win.taps[2];
  const int64_t row = column / (plan.groups * win.taps[2]) % win.taps[1] * win.dilation[1];
  const int64_t slice = column / (plan.groups * win.taps[2] * win.taps[1]);
  const int64_t copy = (slice * win.taps[2] + tap) * plan.groups + group;
  const int64_t turned = row % win.step[1] * plan.x_turn + row / win.step[1];
  return from.x + (copy * plan.batch * plan.x_unit + turned * plan.quads) * LANES * FOUR;
}

// Units of a batch, and how many quads of each are added, after some that were. The sums begin with the first batch.
struct Batch {
  bool is_first;
  int64_t units, skip;
  std::vector<int64_t> quads;
};

// Write sums of a batch, or add them to those before.
INLINE void add_sums(uint8_t *sums, int64_t at, __m512i total, bool is_first, bool is_wide) {
  if (is_wide) {
    int64_t *to = reinterpret_cast<int64_t *>(sums) + at;
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(total));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(total, 1));
    _mm512_storeu_si512(to, is_first ? low : _mm512_add_epi64(low, _mm512_loadu_si512(to)));
    _mm512_storeu_si512(to + 8, is_first ? high : _mm512_add_epi64(high, _mm512_loadu_si512(to + 8)));
  } else {
    int32_t *to = reinterpret_cast<int32_t *>(sums) + at;
    _mm512_storeu_si512(to, is_first ? total : _mm512_add_epi32(total, _mm512_loadu_si512(to)));
  }
}

// Add the products of N rows (unsigned words) and V vectors of columns; N = 0: the sums of the columns alone.
template <int N, int V>
INLINE void add_tile(const Plan &plan, const Batch &batch, const uint8_t *a, const int8_t *const (&x)[V], uint8_t *sums,
                     int64_t first) {
  constexpr int M = N ? N : 1;
  __m512i total[M * V];
  each<M * V>([&](auto i) __attribute__((always_inline)) { total[i] = _mm512_setzero_si512(); });
  for (int64_t unit = 0; unit < batch.units; ++unit) {
    const uint8_t *row = a + (unit * plan.a_unit + batch.skip) * LANES * FOUR;
    int64_t at = (unit * plan.x_unit + batch.skip) * LANES * FOUR;
    for (int64_t quad = batch.quads[unit]; quad > 0; --quad, row += LANES * FOUR, at += LANES * FOUR) {
      __m512i column[V];
      each<V>([&](auto v) __attribute__((always_inline)) { column[v] = _mm512_loadu_si512(x[v] + at); });
      each<M>([&](auto i) __attribute__((always_inline)) {
        int32_t word = 0x01010101;
        if (N) std::memcpy(&word, row + i * FOUR, FOUR);
        const __m512i four = _mm512_set1_epi32(word);
        each<V>([&](auto v) __attribute__((always_inline)) { add_products(total[i * V + v], four, column[v]); });
      });
    }
  }
  each<M * V>([&](auto i) __attribute__((always_inline)) {
    add_sums(sums, first + (i / V * plan.columns + i % V) * LANES, total[i], batch.is_first, N && plan.is_wide);
  });
}

template <int V>
void add_columns(const Call &call, const Plan &plan, const Batch &batch, const Scratch &scratch, int64_t first) {
  const int8_t *x[V];
  for (int v = 0; v < V; ++v) x[v] = find_column(call, plan, scratch, first + v);
  for (int64_t row = 0; row < call.a.channels; row += ROWS) {
    const uint8_t *a = scratch.a + row / LANES * plan.batch * plan.a_unit * LANES * FOUR + row % LANES * FOUR;
    add_tile<ROWS, V>(plan, batch, a, x, scratch.sums, (row * plan.columns + first) * LANES);
  }
  add_tile<0, V>(plan, batch, scratch.a, x, reinterpret_cast<uint8_t *>(scratch.totals), first * LANES);
}

// Σ u of 16 rows.
void add_rows(const Plan &plan, const Batch &batch, const Scratch &scratch, int64_t group) {
  __m512i total = batch.is_first ? _mm512_setzero_si512() : _mm512_loadu_si512(scratch.of_rows + group * LANES);
  for (int64_t unit = 0; unit < batch.units; ++unit)
    for (int64_t quad = 0; quad < batch.quads[unit]; ++quad) {
      const int64_t at = (group * plan.batch + unit) * plan.a_unit + batch.skip + quad;
      add_products(total, _mm512_loadu_si512(scratch.a + at * LANES * FOUR), _mm512_set1_epi8(1));
    }
  _mm512_storeu_si512(scratch.of_rows + group * LANES, total);
}

// Add what is packed of a batch.
void add_packed(const Call &call, const Plan &plan, const Batch &batch, const Scratch &scratch) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic)
  for (int64_t column = 0; column < plan.columns; column += VECTORS) {
    const int64_t width = std::min<int64_t>(VECTORS, plan.columns - column);
    (width == 1 ? add_columns<1> : width == 2 ? add_columns<2> : add_columns<VECTORS>)(call, plan, batch, scratch, column);
  }
  for (int64_t group = 0; group < plan.row_groups; ++group) add_rows(plan, batch, scratch, group);
}

void add_batch(const Call &call, const Plan &plan, const Scratch &scratch, int64_t first) {
  const int64_t units = std::min(plan.batch, plan.units - first);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t thread = 0; thread < call.threads; ++thread) {
    uint8_t *line = scratch.line + thread * std::max(plan.a_line, plan.x_line);
    for (int64_t unit = thread; unit < units; unit += call.threads) {
      const Place place = find_place(call, plan, first + unit);
      pack_a(call, plan, scratch, place, unit, line);
      pack_x(call, plan, scratch, place, unit, line);
    }
  }
  for (int64_t skip = 0; skip < plan.a_unit; skip += PIECE) {  // once, unless a row of positions is very long
    Batch batch{first == 0 && skip == 0, units, skip, {}};
    for (int64_t unit = 0; unit < units; ++unit)
      batch.quads.push_back(std::min(PIECE, find_place(call, plan, first + unit).rows * plan.quads - skip));
    add_packed(call, plan, batch, scratch);
  }
}

// The sums of a row and of 16 columns, less what the zero points add, as floats that are rounded once.
__m512 finish_sums(const Plan &plan, const Scratch &scratch, int64_t row, int64_t column, int64_t p, int64_t own) {
  const int64_t at = (row * plan.columns + column) * LANES;
  const __m512i total = _mm512_loadu_si512(scratch.totals + column * LANES);
  if (!plan.is_wide) {  // terms can wrap around, the sum of all of them does not
    const __m512i sum = _mm512_loadu_si512(reinterpret_cast<const int32_t *>(scratch.sums) + at);
    const __m512i less = _mm512_mullo_epi32(total, _mm512_set1_epi32(int32_t(p)));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(sum, _mm512_set1_epi32(int32_t(own))), less));
  }
  const int64_t *sums = reinterpret_cast<const int64_t *>(scratch.sums) + at;
  const auto finish = [&](const int64_t *from, __m256i half) {
    const __m512i less = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(half), _mm512_set1_epi64(p));
    const __m512i whole = _mm512_add_epi64(_mm512_loadu_si512(from), _mm512_set1_epi64(own));
    return _mm512_cvtepi64_ps(_mm512_sub_epi64(whole, less));
  };
  const __m256 low = finish(sums, _mm512_castsi512_si256(total));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), finish(sums + 8, _mm512_extracti64x4_epi64(total, 1)), 1);
}

// Write one row of the result.
void write_row(const Call &call, const Plan &plan, const Scratch &scratch, int64_t row) {
  const Windows &win = call.windows;
  const int64_t channels = call.x.channels, taps = win.taps[0] * win.taps[1] * win.taps[2];
  const int64_t p = call.a_point.get_point(row) + call.a.flip, q = get_x_point(call);
  const int64_t own = count_positions(call) * p * q - q * scratch.of_rows[row];
  const __m512 factor = _mm512_set1_ps(call.a_scale.get_factor(row));
  for (int64_t column = 0; column < plan.columns; ++column) {
    const int64_t tap = column / plan.groups, channel = column % plan.groups * LANES;
    const __m512 other = _mm512_loadu_ps(scratch.factors + channel);
    __m512 value = scale_sums(finish_sums(plan, scratch, row, column, p, own), factor, other);
    const __mmask16 mask = first_lanes(channels - channel);
    const int64_t step = call.is_channels_last ? 1 : taps;
    float *to = call.result + row * taps * channels + (call.is_channels_last ? tap * channels : tap) + channel * step;
    if (call.is_added) value = _mm512_add_ps(load_lanes(to, step, mask), value);
    store_lanes(to, step, mask, value);
  }
}

}  // namespace

extern "C" int64_t count_scratch(const Call *call) {
  const Plan plan = make_plan(*call);
  const int64_t total_bytes = (plan.columns + plan.row_groups + plan.groups) * LANES * FOUR;
  return plan.a_bytes + plan.x_bytes + plan.sum_bytes + total_bytes + call->threads * std::max(plan.a_line, plan.x_line);
}

extern "C" void convolve_gradient(const Call *given) {
  const Call &call = *given;
  const Plan plan = make_plan(call);
  Scratch scratch{};
  scratch.a = call.scratch;
  scratch.x = reinterpret_cast<int8_t *>(scratch.a + plan.a_bytes);
  scratch.sums = reinterpret_cast<uint8_t *>(scratch.x + plan.x_bytes);
  scratch.totals = reinterpret_cast<int32_t *>(scratch.sums + plan.sum_bytes);
  scratch.of_rows = scratch.totals + plan.columns * LANES;
  scratch.factors = reinterpret_cast<float *>(scratch.of_rows + plan.row_groups * LANES);
  scratch.line = reinterpret_cast<uint8_t *>(scratch.factors + plan.groups * LANES);
  for (int64_t i = 0; i < plan.groups * LANES; ++i)
    scratch.factors[i] = i < call.x.channels ? call.x_scale.get_factor(i) : 0;
  for (int64_t first = 0; first < plan.units; first += plan.batch) add_batch(call, plan, scratch, first);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < call.a.channels; ++row) write_row(call, plan, scratch, row);
}
#endif
