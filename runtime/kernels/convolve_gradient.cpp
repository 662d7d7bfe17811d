// Weight gradients of convolutions of int8 codes, without a copy of what each position reads.
//
//     g[r, c, tap] = float(Σ (a[r, p] − a's zero)·(x[p, k] − x's zero)) · min(a's factor, x's factor) · max(…)
//
// Sums run over positions p of all samples and are exact: in int32 those of a batch of positions, and all of them if they
// fit, or else in int64. Codes are packed so that a word holds neighbors of a row of positions: once for a, and for x
// once for every tap of a row, as a tap moves the neighbors. Taps along the other dimensions read the same copy from
// another row on. Few channels leave lanes empty: then the taps of a row, which lie side by side, share the lanes of a
// vector, so that 3 channels and 3 taps are 9 lanes of one vector. For the zero points, with u = a + 128 unsigned:
//     Σ (u − p)·(s − q) = Σ u·s − p·Σ s − q·Σ u + positions·p·q.
// Words of 16 bits hold signed codes of a too: then u = a, and without a zero point p is 0, and nobody asks for Σ s.
#include "codes.h"
#include "images.h"

#include <vector>

#ifndef HAS_VECTORS
extern "C" void convolve_gradient() {}
extern "C" void count_scratch() {}
#else

namespace {

constexpr int64_t UNIT = 512;   // positions at most of one sample that are packed as one stretch
constexpr int64_t BATCH = 128 * LANES;  // positions at most that are packed at a time: they stay in the second cache
constexpr int64_t PIECE = 8192;  // words of a unit at most whose sums stay in int32: 4·8192·255·128 is half of it
constexpr int64_t MOST = 33025;  // positions whose products, of at most 255², int32 holds
constexpr int64_t MOST_SUMS = 1 << 20;  // bytes of sums that each thread may have for itself
constexpr int ROWS = LANES / 2, VECTORS = LANES == 16 ? 3 : 2;

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
  int64_t joined, taps, channels;        // taps of a row that share lanes; how many such; channels of one of them
  int64_t row_groups, groups, columns;   // of rows, and of channels, for the lanes of a vector; vectors of columns
  int64_t pitch;                         // codes from one of a copied row of x to the next
  int64_t words, rows, chunks, units, batch;  // of a row of positions; of a unit; of a sample; of all; at a time
  int64_t a_unit, x_unit, x_turn;        // words of a unit; rows of x that have the same remainder by the step
  int64_t a_line, x_line;                // codes of a copied row
  int64_t a_bytes, x_bytes, sum_bytes;
  int64_t workers, worker_bytes;         // threads that sum some batches for themselves; memory of each
  bool is_wide;                          // whether sums are int64
  bool keeps_signs;                      // of a
};

int64_t count_positions(const Call &call) {
  return call.a.samples * call.windows.count[0] * call.windows.count[1] * call.windows.count[2];
}

Plan make_plan(const Call &call) {
  const Windows &win = call.windows;
  Plan plan{};
  plan.row_groups = divide_up(call.a.channels, LANES);
  const int64_t apart = win.taps[2] * divide_up(call.x.channels, LANES);
  const bool is_joined = win.dilation[2] == 1 && divide_up(win.taps[2] * call.x.channels, LANES) < apart;
  plan.joined = is_joined ? win.taps[2] : 1;
  plan.taps = win.taps[2] / plan.joined;
  plan.channels = plan.joined * call.x.channels;
  plan.groups = divide_up(plan.channels, LANES);
  plan.columns = win.taps[0] * win.taps[1] * plan.taps * plan.groups;
  plan.pitch = is_joined ? call.x.channels : plan.groups * LANES;
  plan.words = divide_up(win.count[2], WORD);
  const int64_t most = std::clamp<int64_t>(UNIT / (plan.words * WORD), 1, win.count[1]);
  plan.chunks = divide_up(win.count[1], most);
  plan.rows = divide_up(win.count[1], plan.chunks);
  plan.units = call.a.samples * win.count[0] * plan.chunks;
  plan.batch = std::clamp<int64_t>(BATCH / (plan.rows * plan.words * WORD), 1, plan.units);
  plan.x_turn = divide_up(win.reach(1, plan.rows), win.step[1]);
  plan.a_unit = plan.rows * plan.words;
  plan.x_unit = plan.x_turn * win.step[1] * plan.words;
  plan.a_line = plan.words * WORD * plan.row_groups * LANES;
  plan.x_line = win.reach(2, win.count[2]) * plan.pitch + plan.groups * LANES;  // the last lanes may reach behind
  plan.a_bytes = plan.row_groups * plan.batch * plan.a_unit * BYTES;
  plan.x_bytes = win.taps[0] * plan.taps * plan.groups * plan.batch * plan.x_unit * BYTES;
  plan.is_wide = count_positions(call) > MOST;
  plan.keeps_signs = WORD == 2 && call.a.flip;
  plan.sum_bytes = plan.row_groups * LANES * plan.columns * LANES * (plan.is_wide ? 8 : 4);
  plan.workers = plan.sum_bytes > MOST_SUMS ? 1 : std::min(call.threads, divide_up(plan.units, plan.batch));
  const int64_t lines = (plan.workers == 1 ? call.threads : 1) * std::max(plan.a_line, plan.x_line) * sizeof(Code);
  const int64_t bytes = plan.a_bytes + plan.x_bytes + plan.sum_bytes + (plan.columns + plan.row_groups) * BYTES + lines;
  plan.worker_bytes = divide_up(bytes, 64) * 64;
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

// What is added to the zero point of a.
int32_t get_a_shift(const Call &call, const Plan &plan) { return plan.keeps_signs ? 0 : int32_t(call.a.flip); }

bool has_a_points(const Call &call, const Plan &plan) { return call.a_point.is_there() || get_a_shift(call, plan); }

struct Scratch {
  uint8_t *a, *x;
  uint8_t *sums;     // [rows, columns, LANES]
  int32_t *totals;   // [columns, LANES]: Σ s
  int32_t *of_rows;  // [rows]: Σ u
  Code *line;        // of each thread
};

// The factors of the channels of each tap, [groups, LANES], then the memory of each worker.
float *find_factors(const Call &call) { return reinterpret_cast<float *>(call.scratch); }

Scratch find_scratch(const Call &call, const Plan &plan, int64_t worker) {
  Scratch found{};
  found.a = call.scratch + plan.groups * BYTES + worker * plan.worker_bytes;
  found.x = found.a + plan.a_bytes;
  found.sums = found.x + plan.x_bytes;
  found.totals = reinterpret_cast<int32_t *>(found.sums + plan.sum_bytes);
  found.of_rows = found.totals + plan.columns * LANES;
  found.line = reinterpret_cast<Code *>(found.of_rows + plan.row_groups * LANES);
  return found;
}

// Pack neighbors of as many channels as there are lanes; `count` positions are there.
INLINE Ints read_positions(const Code *from, int64_t step, int64_t count) {
  Line line[WORD];
  for (int64_t j = 0; j < WORD; ++j) line[j] = j < count ? load<Line>(from + j * step) : Line{};
  return interleave(line);
}

// Pack a row of positions, `step` codes apart.
INLINE void pack_positions(const Code *from, int64_t step, int64_t count, uint8_t *to) {
  for (; count >= WORD; count -= WORD, from += WORD * step, to += BYTES) store(to, read_positions(from, step, WORD));
  if (count > 0) store(to, read_positions(from, step, count));
}

void pack_a(const Call &call, const Plan &plan, const Scratch &to, const Place &place, int64_t at, Code *line) {
  const int64_t pitch = plan.row_groups * LANES, count = call.windows.count[2];
  const auto copy = plan.keeps_signs ? copy_row<int8_t, Code> : copy_row<uint8_t, Code>;
  Image image = call.a;
  if (plan.keeps_signs) image.flip = 0;
  for (int64_t row = 0; row < place.rows; ++row) {
    copy(image, 0, place.sample, place.depth, place.first + row, 0, count, pitch, line);
    for (int64_t group = 0; group < plan.row_groups; ++group) {
      uint8_t *packed = to.a + ((group * plan.batch + at) * plan.a_unit + row * plan.words) * BYTES;
      pack_positions(line + group * LANES, pitch, count, packed);
    }
  }
}

void pack_x(const Call &call, const Plan &plan, const Scratch &to, const Place &place, int64_t at, Code *line) {
  const Windows &win = call.windows;
  const int64_t pitch = plan.pitch, length = win.reach(2, win.count[2]), count = win.count[2];
  const int32_t zero = get_x_point(call);
  for (int64_t slice = 0; slice < win.taps[0]; ++slice)
    for (int64_t row = 0; row < win.reach(1, place.rows); ++row) {
      const int64_t depth = win.start[0] + place.depth * win.step[0] + slice * win.dilation[0];
      copy_row<int8_t>(call.x, zero, place.sample, depth, win.start[1] + place.first * win.step[1] + row, win.start[2], length, pitch,
               line);
      const int64_t turned = row % win.step[1] * plan.x_turn + row / win.step[1];
      for (int64_t tap = 0; tap < plan.taps; ++tap)
        for (int64_t group = 0; group < plan.groups; ++group) {
          const int64_t copy = (slice * plan.taps + tap) * plan.groups + group;
          uint8_t *packed = to.x + ((copy * plan.batch + at) * plan.x_unit + turned * plan.words) * BYTES;
          pack_positions(line + tap * win.dilation[2] * pitch + group * LANES, win.step[2] * pitch, count, packed);
        }
    }
}

// A vector of columns is some channels of one tap, or of joined ones: where its codes begin, in order of channels, then
// of taps.
const uint8_t *find_column(const Call &call, const Plan &plan, const Scratch &from, int64_t column) {
  const Windows &win = call.windows;
  const int64_t group = column % plan.groups, tap = column / plan.groups % plan.taps;
  const int64_t row = column / (plan.groups * plan.taps) % win.taps[1] * win.dilation[1];
  const int64_t slice = column / (plan.groups * plan.taps * win.taps[1]);
  const int64_t copy = (slice * plan.taps + tap) * plan.groups + group;
  const int64_t turned = row % win.step[1] * plan.x_turn + row / win.step[1];
  return from.x + (copy * plan.batch * plan.x_unit + turned * plan.words) * BYTES;
}

// Units of a batch, and how many words of each are added, after some that were. The sums begin with the first batch.
struct Batch {
  bool is_first;
  int64_t units, skip;
  std::vector<int64_t> words;
};

// Write sums of a batch, or add them to those before.
INLINE void add_sums(uint8_t *sums, int64_t at, Ints total, bool is_first, bool is_wide) {
  if (is_wide) {
    int64_t *to = reinterpret_cast<int64_t *>(sums) + at;
    for (int64_t i = 0; i < LANES; ++i) to[i] = (is_first ? 0 : to[i]) + int32_t(total[i]);
  } else {
    int32_t *to = reinterpret_cast<int32_t *>(sums) + at;
    store(to, is_first ? total : load<Ints>(to) + total);
  }
}

// Add the products of some rows (unsigned words) and V vectors of columns, and of a row of ones: what zero points need.
template <int V, bool COUNTS>
void add_tile(const Plan &plan, const Batch &batch, const Scratch &scratch, const uint8_t *const (&x)[V], int64_t row, int64_t first) {
  const uint8_t *a = scratch.a + row / LANES * plan.batch * plan.a_unit * BYTES + row % LANES * WORD * sizeof(Code);
  constexpr int N = ROWS + COUNTS;
  Ints total[N * V] = {};
  for (int64_t unit = 0; unit < batch.units; ++unit) {
    const uint8_t *words = a + (unit * plan.a_unit + batch.skip) * BYTES;
    int64_t at = (unit * plan.x_unit + batch.skip) * BYTES;
#pragma GCC unroll UNROLL
    for (int64_t count = batch.words[unit]; count > 0; --count, words += BYTES, at += BYTES) {
      Ints column[V];
      each<V>([&](auto v) __attribute__((always_inline)) { column[v] = load_words(x[v] + at); });
      each<N>([&](auto i) __attribute__((always_inline)) {
        const Ints word = i < ROWS ? spread_word(reinterpret_cast<const Code *>(words) + i * WORD) : spread_code(1);
        each<V>([&](auto v) __attribute__((always_inline)) { add_products(total[i * V + v], word, column[v]); });
      });
    }
  }
  each<ROWS * V>([&](auto i) __attribute__((always_inline)) {
    add_sums(scratch.sums, ((row + i / V) * plan.columns + first + i % V) * LANES, total[i], batch.is_first, plan.is_wide);
  });
  each<COUNTS * V>([&](auto v) __attribute__((always_inline)) {
    add_sums(reinterpret_cast<uint8_t *>(scratch.totals), (first + v) * LANES, total[ROWS * V + v], batch.is_first, false);
  });
}

template <int V>
void add_columns(const Call &call, const Plan &plan, const Batch &batch, const Scratch &scratch, int64_t first) {
  const uint8_t *x[V];
  for (int v = 0; v < V; ++v) x[v] = find_column(call, plan, scratch, first + v);
  const bool counts = has_a_points(call, plan);
  for (int64_t row = 0; row < call.a.channels; row += ROWS)
    (row == 0 && counts ? add_tile<V, true> : add_tile<V, false>)(plan, batch, scratch, x, row, first);
}

// Σ u of a group of rows.
void add_rows(const Plan &plan, const Batch &batch, const Scratch &scratch, int64_t group) {
  Ints total = batch.is_first ? Ints{} : load<Ints>(scratch.of_rows + group * LANES);
  for (int64_t unit = 0; unit < batch.units; ++unit)
    for (int64_t i = 0; i < batch.words[unit]; ++i) {
      const int64_t at = (group * plan.batch + unit) * plan.a_unit + batch.skip + i;
      add_products(total, load<Ints>(scratch.a + at * BYTES), spread_code(1));
    }
  store(scratch.of_rows + group * LANES, total);
}

// Add what is packed of a batch.
void add_packed(const Call &call, const Plan &plan, const Batch &batch, const Scratch &scratch) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic)
  for (int64_t column = 0; column < plan.columns; column += VECTORS) {
    const int64_t width = std::min<int64_t>(VECTORS, plan.columns - column);
    (width == 1 ? add_columns<1> : width == 2 ? add_columns<2> : add_columns<VECTORS>)(call, plan, batch, scratch, column);
  }
  for (int64_t group = 0; group < (get_x_point(call) ? plan.row_groups : 0); ++group)
    add_rows(plan, batch, scratch, group);
}

void add_batch(const Call &call, const Plan &plan, const Scratch &scratch, int64_t first, bool is_first) {
  const int64_t units = std::min(plan.batch, plan.units - first);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t thread = 0; thread < call.threads; ++thread) {
    Code *line = scratch.line + thread * std::max(plan.a_line, plan.x_line);
    for (int64_t unit = thread; unit < units; unit += call.threads) {
      const Place place = find_place(call, plan, first + unit);
      pack_a(call, plan, scratch, place, unit, line);
      pack_x(call, plan, scratch, place, unit, line);
    }
  }
  for (int64_t skip = 0; skip < plan.a_unit; skip += PIECE) {  // once, unless a row of positions is very long
    Batch batch{is_first && skip == 0, units, skip, {}};
    for (int64_t unit = 0; unit < units; ++unit)
      batch.words.push_back(std::min(PIECE, find_place(call, plan, first + unit).rows * plan.words - skip));
    add_packed(call, plan, batch, scratch);
  }
}

// Sum the batches of a worker.
void add_batches(const Call &call, const Plan &plan, int64_t worker) {
  const int64_t batches = divide_up(plan.units, plan.batch);
  const int64_t first = worker * batches / plan.workers, last = (worker + 1) * batches / plan.workers;
  const Scratch scratch = find_scratch(call, plan, worker);
  for (int64_t batch = first; batch < last; ++batch) add_batch(call, plan, scratch, batch * plan.batch, batch == first);
}

// Sum all batches: if the sums are few, each thread has its own. Else all threads share each batch, for which they wait
// for each other: two threads took 0.9 ms for 16 channels, in place of 0.6.
void add_all(const Call &call, const Plan &plan) {
  if (plan.workers == 1) return add_batches(call, plan, 0);  // a region of one thread would have no others inside
  Call alone = call;
  alone.threads = 1;
#pragma omp parallel for num_threads(plan.workers) schedule(static)
  for (int64_t worker = 0; worker < plan.workers; ++worker) add_batches(alone, plan, worker);
}

template <typename Int>
void join_numbers(const void *from, int64_t count, int64_t threads, void *to) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) static_cast<Int *>(to)[i] += static_cast<const Int *>(from)[i];
}

// Add the sums of all workers to those of the first.
void join_sums(const Call &call, const Plan &plan) {
  const Scratch to = find_scratch(call, plan, 0);
  for (int64_t worker = 1; worker < plan.workers; ++worker) {
    const Scratch from = find_scratch(call, plan, worker);
    if (plan.is_wide)
      join_numbers<int64_t>(from.sums, plan.sum_bytes / 8, call.threads, to.sums);
    else
      join_numbers<uint32_t>(from.sums, plan.sum_bytes / 4, call.threads, to.sums);
    join_numbers<uint32_t>(from.totals, (plan.columns + plan.row_groups) * LANES, 1, to.totals);  // and of rows, which follow
  }
}

// The sums of a row and of some columns, less what the zero points add, as floats that are rounded once.
Floats finish_sums(const Plan &plan, const Scratch &scratch, int64_t row, int64_t column, int64_t p, int64_t own) {
  const int64_t at = (row * plan.columns + column) * LANES;
  const Ints total = load<Ints>(scratch.totals + column * LANES);
  if (!plan.is_wide)  // terms can wrap around, the sum of all of them does not
    return to_floats(load<Ints>(scratch.sums + at * sizeof(int32_t)) + spread(int32_t(own)) - total * spread(int32_t(p)));
  const int64_t *sums = reinterpret_cast<const int64_t *>(scratch.sums) + at;
  float values[LANES];
  for (int64_t i = 0; i < LANES; ++i) values[i] = float(sums[i] + own - p * int32_t(total[i]));
  return load<Floats>(values);
}

// Write one row of the result.
void write_row(const Call &call, const Plan &plan, const Scratch &scratch, int64_t row) {
  const Windows &win = call.windows;
  const int64_t channels = call.x.channels, taps = win.taps[0] * win.taps[1] * win.taps[2];
  const int64_t p = call.a_point.get_point(row) + get_a_shift(call, plan), q = get_x_point(call);  // 0: no sum is there
  const int64_t own = count_positions(call) * p * q - q * scratch.of_rows[row];
  const Floats factor = spread(call.a_scale.get_factor(row));
  float *result = call.result + row * taps * channels;
  for (int64_t column = 0; column < plan.columns; ++column) {
    const int64_t tap = column / plan.groups * plan.joined, lane = column % plan.groups * LANES;
    const Floats value = scale_sums(finish_sums(plan, scratch, row, column, p, own), factor, load<Floats>(find_factors(call) + lane));
    if (call.is_channels_last || plan.joined == 1) {
      const int64_t step = call.is_channels_last ? 1 : taps;
      float *to = result + (call.is_channels_last ? tap * channels : tap) + lane * step;
      const Mask mask = first_lanes(plan.channels - lane);
      store_lanes(to, step, mask, call.is_added ? load_lanes(to, step, mask) + value : value);
    } else {
      for (int64_t i = 0; i < std::min(LANES, plan.channels - lane); ++i) {
        float &to = result[(lane + i) % channels * taps + tap + (lane + i) / channels];
        to = call.is_added ? to + value[i] : value[i];
      }
    }
  }
}

}  // namespace

extern "C" int64_t count_scratch(const Call *call) {
  const Plan plan = make_plan(*call);
  return plan.groups * BYTES + plan.workers * plan.worker_bytes;
}

extern "C" void convolve_gradient(const Call *given) {
  const Call &call = *given;
  const Plan plan = make_plan(call);
  float *factors = find_factors(call);
  for (int64_t i = 0; i < plan.groups * LANES; ++i)
    factors[i] = i < plan.channels ? call.x_scale.get_factor(i % call.x.channels) : 0;
  add_all(call, plan);
  join_sums(call, plan);
  const Scratch scratch = find_scratch(call, plan, 0);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < call.a.channels; ++row) write_row(call, plan, scratch, row);
}
#endif
