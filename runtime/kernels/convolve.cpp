// Convolutions of int8 codes, without a copy of what each position reads.
//
//     y[n, p] = float(Σ (x[p, k] − x's zero)·w[k, n]) · min(x's factor, w's factor) · max(…) + bias[n]
//
// Sums are exact in int32; every operation on floats is rounded by itself. Rows of the image are copied, channel by
// channel beside each other and with the border, so that what one position reads lies in few stretches: for every row of
// taps one. 128 is added to signed codes of the image, as a dot product takes unsigned codes of one side, and a sum
// starts at −(zero + 128)·Σ w.
#include "codes.h"
#include "images.h"

#include <vector>

#ifndef HAS_VECTORS
extern "C" void convolve() {}
extern "C" void copy_image() {}
extern "C" void count_scratch() {}
#else

namespace {

constexpr int64_t MOST = 131072 / sizeof(Code);   // codes of rows, copied at a time: they stay in the second cache
constexpr int64_t PAD = 64;                       // codes behind the rows, which words may reach
constexpr int MOST_GROUPS = LANES == 16 ? 3 : 2;  // of columns that a tile has

// Codes [columns, taps, rows] with strides, whose taps can be in reverse.
struct Weight {
  const int8_t *codes;  // of the first tap
  int64_t columns, rows, step, row_step, tap_step[DIMS];
};

struct Call {
  Image x;  // unsigned after the copy
  Windows windows;
  Weight w;
  Values x_scale, x_point;     // of samples
  Values w_scale;              // of columns
  const float *bias;           // for every column, or null
  int64_t stride[2 + DIMS];    // of y: samples, columns, positions
  int64_t is_added;            // to y, of float32, instead of written
  int64_t size;                // bytes of an element of y
  int64_t threads;
  uint8_t *scratch, *y;
};

// Sizes that follow from a call.
struct Plan {
  int64_t groups, rows, chunks, row_codes, slice_codes, image_codes, words;
  int64_t length;           // codes of a stretch
  std::vector<int64_t> at;  // from the first code that a position reads to each stretch
  std::vector<int64_t> first;  // from the first code of some rows to that of each position
};

Plan make_plan(const Call &call) {
  const Windows &win = call.windows;
  Plan plan{};
  plan.groups = divide_up(call.w.columns, LANES);
  plan.row_codes = win.reach(2, win.count[2]) * call.x.channels;
  const int64_t fit = MOST / (plan.row_codes * win.taps[0]) - win.reach(1, 1);
  const int64_t most = std::clamp<int64_t>(fit / win.step[1] + 1, 1, win.count[1]);
  plan.chunks = divide_up(win.count[1], most);
  plan.rows = divide_up(win.count[1], plan.chunks);
  plan.slice_codes = win.reach(1, plan.rows) * plan.row_codes;
  plan.image_codes = divide_up(win.taps[0] * plan.slice_codes + PAD, 64) * 64;
  const bool is_joined = win.dilation[2] == 1;  // taps of one row lie side by side
  plan.length = (is_joined ? win.taps[2] : 1) * call.x.channels;
  for (int64_t slice = 0; slice < win.taps[0]; ++slice)
    for (int64_t row = 0; row < win.taps[1]; ++row)
      for (int64_t tap = 0; tap < (is_joined ? 1 : win.taps[2]); ++tap)
        plan.at.push_back(slice * plan.slice_codes + row * win.dilation[1] * plan.row_codes +
                          tap * win.dilation[2] * call.x.channels);
  for (int64_t row = 0; row < plan.rows; ++row)
    for (int64_t i = 0; i < win.count[2]; ++i)
      plan.first.push_back(row * win.step[1] * plan.row_codes + i * win.step[2] * call.x.channels);
  plan.words = int64_t(plan.at.size()) * divide_up(plan.length, WORD);
  return plan;
}

int64_t count_weights(const Plan &plan) { return plan.groups * plan.words * BYTES; }

// Words of columns, from the row `k` of a stretch on. A stretch can have some taps.
Ints read_weight(const Call &call, const Plan &plan, int64_t group, int64_t stretch, int64_t k) {
  const Weight &w = call.w;
  const int64_t *taps = call.windows.taps;
  const auto find_tap = [&](int64_t row) {
    const int64_t tap = (stretch * plan.length + row) / w.rows, slice = tap / (taps[1] * taps[2]);
    return w.codes + slice * w.tap_step[0] + tap / taps[2] % taps[1] * w.tap_step[1] + tap % taps[2] * w.tap_step[2];
  };
  const int64_t count = std::min(WORD, plan.length - k), first = group * LANES;
  if (k % w.rows + count <= w.rows) {  // of one tap
    const Matrix matrix{find_tap(k) + k % w.rows * w.row_step, w.columns, w.step, w.row_step};
    return read_words(matrix, first, 0, count);
  }
  alignas(64) int8_t words[CODES] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < std::min(LANES, w.columns - first); ++i)
      words[i * WORD + j] = find_tap(k + j)[(first + i) * w.step + (k + j) % w.rows * w.row_step];
  return read_codes(words);
}

// Pack one group of columns: its words, and Σ w of every column.
void pack_group(const Call &call, const Plan &plan, int64_t group, uint8_t *packed, int32_t *totals) {
  uint8_t *to = packed + group * plan.words * BYTES;
  const int64_t stretches = plan.at.size();
  Ints total{};
  for (int64_t s = 0; s < stretches; ++s)
    for (int64_t k = 0; k < plan.length; k += WORD, to += BYTES) {
      const Ints words = read_weight(call, plan, group, s, k);
      add_products(total, spread_code(1), words);
      store(to, words);
    }
  store(totals + group * LANES, total);
}

struct Task {
  const Call &call;
  const Plan &plan;
  const uint8_t *packed;
  const int32_t *totals;
  const float *factors;  // of columns
  float factor;
  int32_t zero;
  bool is_turned;  // columns of a position lie apart
};

// Write or add a line of values, `step` apart in memory, then the bias.
INLINE void write_line(const Call &call, Output to, int64_t step, Mask mask, Floats values, Floats bias) {
  if (call.is_added) values = load_lanes(to.as_floats(), step, mask) + values;
  store_lanes(to, step, mask, call.bias ? values + bias : values);
}

// Write or add a group of columns of N positions, then the bias. The first `skip` positions are not written.
template <int N>
INLINE void write_columns(const Call &call, Floats (&values)[N], int64_t first, int64_t skip, Output y) {
  const int64_t step = call.stride[4];
  const Mask mask = first_lanes(call.w.columns - first);
  if (call.is_added)
    each<N>([&](auto i) __attribute__((always_inline)) { values[i] = load_floats(mask, (y + i * step).as_floats()) + values[i]; });
  if (call.bias) {
    const Floats bias = load_floats(mask, call.bias + first);
    each<N>([&](auto i) __attribute__((always_inline)) { values[i] += bias; });
  }
  if (!is_full(mask) || skip)
    for (int64_t i = skip; i < N; ++i) store_lanes(y + i * step, 1, mask, values[i]);
  else if (y.size == sizeof(float))
    each<N>([&](auto i) __attribute__((always_inline)) { store((y + i * step).data, values[i]); });
  else
    each<N>([&](auto i) __attribute__((always_inline)) { store((y + i * step).data, to_shorts(values[i])); });
}

// Write a group of columns whose values lie far from column to column: a call, as the square of positions is long.
void write_turned(const Task &task, Floats (&values)[LANES], int64_t first, Mask positions, Output y) {
  const Call &call = task.call;
  turn_floats(values);
  for (int64_t i = 0; i < std::min(LANES, call.w.columns - first); ++i)
    write_line(call, y + (first + i) * call.stride[1], call.stride[4], positions, values[i],
               call.bias ? spread(call.bias[first + i]) : Floats{});
}

// N positions, V groups of columns. The first `skip` positions are not written.
template <int N, int V>
INLINE void convolve_tile(const Task &task, const Code *image, const int64_t *places, int64_t group, int64_t skip, Output y) {
  const Plan &plan = task.plan;
  const int64_t size = plan.words * BYTES;
  const uint8_t *w = task.packed + group * size;
  Ints sums[N * V];
  each<V>([&](auto v) __attribute__((always_inline)) {
    const Ints start = load<Ints>(task.totals + (group + v) * LANES) * spread(-task.zero);
    each<N>([&](auto i) __attribute__((always_inline)) { sums[i * V + v] = start; });
  });
  const int64_t words = divide_up(plan.length, WORD);
  int64_t x[N];
  each<N>([&](auto i) __attribute__((always_inline)) { x[i] = places[i]; });
  for (int64_t at : plan.at) {
    const Code *from = image + at;
#pragma GCC unroll UNROLL
    for (const Code *end = from + words * WORD; from < end; from += WORD, w += BYTES) {
      Ints weights[V];
      each<V>([&](auto v) __attribute__((always_inline)) { weights[v] = load_words(w + v * size); });
      each<N>([&](auto i) __attribute__((always_inline)) {
        const Ints word = spread_word(from + x[i]);
        each<V>([&](auto v) __attribute__((always_inline)) { add_products(sums[i * V + v], word, weights[v]); });
      });
    }
  }
  const Floats factor = spread(task.factor);
  each<V>([&](auto v) __attribute__((always_inline)) {
    const int64_t first = (group + v) * LANES;
    const Floats own = load<Floats>(task.factors + first);
    const auto scale = [&](auto i) __attribute__((always_inline)) {
      return scale_sums(to_floats(sums[i * V + v]), factor, own);
    };
    if (task.is_turned) {
      Floats values[LANES] = {};
      each<N>([&](auto i) __attribute__((always_inline)) { values[i] = scale(i); });
      write_turned(task, values, first, lanes_between(skip, N), y);
    } else {
      Floats values[N];
      each<N>([&](auto i) __attribute__((always_inline)) { values[i] = scale(i); });
      write_columns<N>(task.call, values, first, skip, y + first);
    }
  });
}

// Positions from one to another. The last tile starts early, and computes some of them twice, but writes them once.
template <int N, int V>
void convolve_tiles(const Task &task, const Code *image, const int64_t *places, int64_t from, int64_t to, int64_t group, Output y) {
  for (int64_t i = from; i < to; i += N) {
    const int64_t at = std::min(i, to - N);
    convolve_tile<N, V>(task, image, places + at, group, i - at, y + at * task.call.stride[4]);
  }
}

// Positions of a wide tile, whose sums and weights fill the registers. The places of 16 positions would be loaded again
// for each word: what takes 12 of them 1.04 ms, with 16 columns, takes those 1.2.
template <int V>
constexpr int WIDE = V == 1 ? std::min<int>(LANES, 12) : LANES == 16 ? 8 : 6;

// How many tiles of 4 there are beside wide ones, so that the fewest positions are computed twice.
template <int V>
int64_t count_fours(int64_t count) {
  int64_t best = divide_up(count, 4), least = 4 * best + 1;
  for (int64_t fours = 0; fours < 4 && count - 4 * fours >= WIDE<V>; ++fours) {
    const int64_t computed = 4 * fours + divide_up(count - 4 * fours, WIDE<V>) * WIDE<V>;
    if (computed < least) least = computed, best = fours;
  }
  return best;
}

// Positions whose values have one distance in memory.
template <int V>
void convolve_positions(const Task &task, const Code *image, const int64_t *places, int64_t count, int64_t group, Output y) {
  if (count < 4) return convolve_tiles<1, V>(task, image, places, 0, count, group, y);
  const int64_t narrow = std::min(4 * count_fours<V>(count), count);
  convolve_tiles<4, V>(task, image, places, 0, narrow, group, y);
  convolve_tiles<WIDE<V>, V>(task, image, places, narrow, count, group, y);
}

// Some rows of positions: the image is copied once, then a few columns of w after the other pass over it.
void convolve_chunk(const Task &task, int64_t sample, int64_t depth, int64_t first, Code *image) {
  const Windows &win = task.call.windows;
  const Plan &plan = task.plan;
  const int64_t rows = std::min(plan.rows, win.count[1] - first), reach = win.reach(1, rows);
  for (int64_t slice = 0; slice < win.taps[0]; ++slice)
    for (int64_t row = 0; row < reach; ++row)
      copy_row<uint8_t>(task.call.x, task.zero, sample,
                        win.start[0] + depth * win.step[0] + slice * win.dilation[0],
                        win.start[1] + first * win.step[1] + row, win.start[2], plan.row_codes / task.call.x.channels,
                        task.call.x.channels, image + slice * plan.slice_codes + row * plan.row_codes);
  const int64_t *stride = task.call.stride;
  const Output y = Output{task.call.y, task.call.size} + sample * stride[0] + depth * stride[2] + first * stride[3];
  const int64_t joined = stride[3] == win.count[2] * stride[4] ? rows : 1;  // rows that follow each other in y
  const bool is_scattered = stride[1] != 1 && stride[4] != 1;  // 8 positions take 5 times as long as 16 of fewer columns
  for (int64_t group = 0, width = 0; group < plan.groups; group += width) {
    width = is_scattered ? 1 : std::min<int64_t>(plan.groups - group, plan.groups % 3 == 0 ? MOST_GROUPS : 2);
    const auto convolve = width == 1 ? convolve_positions<1> : width == 2 ? convolve_positions<2> : convolve_positions<MOST_GROUPS>;
    for (int64_t row = 0; row < rows; row += joined)
      convolve(task, image, plan.first.data() + row * win.count[2], joined * win.count[2], group, y + row * stride[3]);
  }
}

}  // namespace

// Copy an image as [samples, space, channels].
extern "C" void copy_image(const Image *given, int64_t threads, uint8_t *to) {
  const Image &x = *given;
  const int64_t rows = x.samples * x.space[0] * x.space[1];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < rows; ++at)
    copy_row<int8_t>(x, 0, at / (x.space[0] * x.space[1]), at / x.space[1] % x.space[0], at % x.space[1], 0, x.space[2], x.channels,
             to + at * x.space[2] * x.channels);
}

// Bytes of scratch: packed weights, their sums and factors, and the rows of each thread.
extern "C" int64_t count_scratch(const Call *call) {
  const Plan plan = make_plan(*call);
  return count_weights(plan) + 2 * plan.groups * BYTES + call->threads * plan.image_codes * sizeof(Code);
}

extern "C" void convolve(const Call *given) {
  const Call &call = *given;
  const Windows &win = call.windows;
  const Plan plan = make_plan(call);
  uint8_t *packed = call.scratch;
  int32_t *totals = reinterpret_cast<int32_t *>(packed + count_weights(plan));
  float *factors = reinterpret_cast<float *>(totals + plan.groups * LANES);
  Code *images = reinterpret_cast<Code *>(factors + plan.groups * LANES);
  const int64_t tasks = call.x.samples * win.count[0] * plan.chunks, columns = call.w.columns;
  for (int64_t i = 0; i < plan.groups * LANES; ++i) factors[i] = i < columns ? call.w_scale.get_factor(i) : 0;
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t group = 0; group < plan.groups; ++group) pack_group(call, plan, group, packed, totals);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t thread = 0; thread < call.threads; ++thread)
    for (int64_t at = thread * tasks / call.threads; at < (thread + 1) * tasks / call.threads; ++at) {
      const int64_t sample = at / plan.chunks / win.count[0];
      const float factor = call.x_scale.get_factor(sample);
      const int32_t zero = call.x_point.get_point(sample) + int32_t(call.x.flip);
      const Task task{call, plan, packed, totals, factors, factor, zero, call.stride[1] != 1};
      convolve_chunk(task, sample, at / plan.chunks % win.count[0], at % plan.chunks * plan.rows,
                     images + thread * plan.image_codes);
    }
}
#endif
