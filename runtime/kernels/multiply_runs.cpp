// Products of int8 codes whose scales change along the summed axis: each run of a sum is exact in int32, is scaled, and
// is added in float32.
//
//     c[m, n] = ((0 + t(0)) + t(1)) + …,    t(r) = float(Σ a[m, k]·b[k, n] of run r) · (a_factor[m, r] · b_factor[n, r])
//
// Every operation on floats is rounded by itself, in this order: the result does not depend on blocks or threads.
//
// Both operands are packed alike, into groups of as many rows of a or columns of b as a vector has lanes: a vector holds
// a word of neighboring codes of the summed axis of each. The dot product multiplies unsigned by signed codes. So 128 is
// added to the codes of a, and the sum of a run starts at −128·Σ b.
#include "codes.h"

#ifndef HAS_VECTORS
extern "C" void multiply_runs() {}
extern "C" void count_scratch() {}
#else
namespace {

constexpr int64_t ROWS = LANES == 16 ? 8 : 6, VECTORS = LANES == 16 ? 3 : 2;  // their sums fill the registers
constexpr int64_t DEPTH = 64 * LANES;  // codes of the summed axis at a time, with
constexpr int64_t TASK_GROUPS = 48;    // groups of b: 768 KiB, or 384 with AVX2, stay in the second cache for
constexpr int64_t TASK_ROWS = 8 * ROWS;  // rows of a after each other

// A matrix of codes, and where its packed copy is.
struct Operand {
  Matrix matrix;
  const float *factors;  // [blocks of outer, runs]
  int64_t edge;          // neighbors along outer that share a factor
  uint8_t *packed;       // [groups, words] vectors
  float *lanes;          // [groups, runs, LANES]: the factor of every row or column
  int32_t *start;        // [groups, runs, LANES]: where the sum of a run begins; null: no shift
  int64_t groups() const { return divide_up(matrix.outer, LANES); }
};

struct Sum {
  int64_t length, run, runs;
  int64_t words_of(int64_t r) const { return divide_up(std::min(run, length - r * run), WORD); }
  int64_t words_before(int64_t r) const { return r * divide_up(run, WORD); }
  int64_t words() const { return words_before(runs - 1) + words_of(runs - 1); }
};

void pack_run(const Operand &x, const Sum &sum, int64_t group, int64_t r) {
  const int64_t end = std::min((r + 1) * sum.run, sum.length), at = group * sum.runs + r;
  uint8_t *to = x.packed + (group * sum.words() + sum.words_before(r)) * BYTES;
  Ints total{};
  for (int64_t k = r * sum.run; k < end; k += WORD, to += BYTES) {
    const Ints words = read_words(x.matrix, group * LANES, k, end - k);
    add_products(total, spread_code(128), words);
    store(to, x.start ? words : shift_codes(words));
  }
  if (x.start) store(x.start + at * LANES, -total);
  for (int64_t i = 0; i < LANES; ++i) {
    const int64_t row = std::min(group * LANES + i, x.matrix.outer - 1);
    x.lanes[at * LANES + i] = x.factors[row / x.edge * sum.runs + r];
  }
}

// Pack some groups run by run: in lines, they are 64 bytes side by side.
void pack(const Operand &x, const Sum &sum, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < x.groups(); first += 64 / LANES)
    for (int64_t r = 0; r < sum.runs; ++r)
      for (int64_t group = first; group < std::min(first + 64 / LANES, x.groups()); ++group) pack_run(x, sum, group, r);
}

struct Product {
  Operand a, b;
  Sum sum;
  float *c;  // [a.outer, b.outer]
};

// Some rows of a, the groups of b beside them, and the runs of the summed axis to be added.
struct Tile {
  int64_t row, rows, group, from, to;
};

template <int64_t N>
using Total = float[ROWS][N][LANES];

// The place of a row of a tile in the groups of a: of words, and of factors. Behind the last row is the last one again.
INLINE int64_t find_row(const Tile &tile, int64_t i, int64_t length, int64_t skip) {
  const int64_t row = LANES % ROWS ? tile.row + std::min(i, tile.rows - 1) : tile.row;
  return (row / LANES * length + skip) * LANES + row % LANES + (LANES % ROWS ? 0 : i);
}

// Sum one run of some rows and N groups of columns.
template <int64_t N>
INLINE void sum_run(const Product &p, const Tile &tile, int64_t r, Ints (&sums)[ROWS][N]) {
  const int64_t words = p.sum.words(), skip = p.sum.words_before(r), count = p.sum.words_of(r);
  const Code *rows[ROWS];
  each<ROWS>([&](auto i) __attribute__((always_inline)) {
    rows[i] = reinterpret_cast<const Code *>(p.a.packed) + find_row(tile, i, words, skip) * WORD;
  });
  const uint8_t *b = p.b.packed + (tile.group * words + skip) * BYTES;
  for (int64_t v = 0; v < N; ++v) {
    const Ints start = load<Ints>(p.b.start + ((tile.group + v) * p.sum.runs + r) * LANES);
    for (int64_t i = 0; i < ROWS; ++i) sums[i][v] = start;
  }
  for (int64_t q = 0; q < count; ++q) {
    Ints columns[N];
    each<N>([&](auto v) __attribute__((always_inline)) { columns[v] = load_words(b + (v * words + q) * BYTES); });
    each<ROWS>([&](auto i) __attribute__((always_inline)) {
      const Ints word = spread_word(rows[i] + q * CODES);
      each<N>([&](auto v) __attribute__((always_inline)) { add_products(sums[i][v], word, columns[v]); });
    });
  }
}

// Scale the sums of one run and add them. If all rows share a factor, it meets that of a column once.
template <int64_t N, bool IS_SHARED>
INLINE void add_run(const Product &p, const Tile &tile, int64_t r, const Ints (&sums)[ROWS][N], Total<N> &total) {
  const auto spread_factor = [&](int64_t i) __attribute__((always_inline)) {
    return spread(p.a.lanes[find_row(tile, i, p.sum.runs, r)]);
  };
  for (int64_t v = 0; v < N; ++v) {
    const Floats of_columns = load<Floats>(p.b.lanes + ((tile.group + v) * p.sum.runs + r) * LANES);
    const Floats shared = spread_factor(0) * of_columns;
    for (int64_t i = 0; i < ROWS; ++i) {
      const Floats factor = IS_SHARED ? shared : spread_factor(i) * of_columns;
      store(total[i][v], load<Floats>(total[i][v]) + to_floats(sums[i][v]) * factor);
    }
  }
}

// Add some runs of some rows and N groups of columns to c.
template <int64_t N, bool IS_SHARED>
void multiply_tile(const Product &p, const Tile &tile) {
  const int64_t columns = p.b.matrix.outer;
  float *c = p.c + tile.row * columns + tile.group * LANES;
  alignas(64) Total<N> total = {};
  Mask mask[N];
  for (int64_t v = 0; v < N; ++v) mask[v] = first_lanes(columns - (tile.group + v) * LANES);
  for (int64_t i = 0; i < (tile.from > 0 ? tile.rows : 0); ++i)
    for (int64_t v = 0; v < N; ++v) store(total[i][v], load_floats(mask[v], c + i * columns + v * LANES));
  for (int64_t r = tile.from; r < tile.to; ++r) {
    Ints sums[ROWS][N];
    sum_run<N>(p, tile, r, sums);
    add_run<N, IS_SHARED>(p, tile, r, sums, total);
  }
  for (int64_t i = 0; i < tile.rows; ++i)
    for (int64_t v = 0; v < N; ++v) store_floats(mask[v], c + i * columns + v * LANES, load<Floats>(total[i][v]));
}

template <bool IS_SHARED>
void multiply_groups(const Product &p, const Tile &tile, int64_t groups) {
  if (groups == 1) return multiply_tile<1, IS_SHARED>(p, tile);
  if (groups == 2) return multiply_tile<2, IS_SHARED>(p, tile);
  multiply_tile<VECTORS, IS_SHARED>(p, tile);
}

// Multiply some rows and groups of columns, a stretch of the summed axis after the other.
void multiply_task(const Product &p, int64_t first_row, int64_t first_group) {
  const int64_t last_row = std::min(first_row + TASK_ROWS, p.a.matrix.outer);
  const int64_t last_group = std::min(first_group + TASK_GROUPS, p.b.groups());
  const int64_t stretch = std::max<int64_t>(1, DEPTH / p.sum.run);
  for (int64_t from = 0; from < p.sum.runs; from += stretch)
    for (int64_t row = first_row; row < last_row; row += ROWS)
      for (int64_t group = first_group; group < last_group; group += VECTORS) {
        const int64_t rows = std::min(ROWS, last_row - row);
        const Tile tile{row, rows, group, from, std::min(from + stretch, p.sum.runs)};
        const bool is_shared = row / p.a.edge == (row + rows - 1) / p.a.edge;
        (is_shared ? multiply_groups<true> : multiply_groups<false>)(p, tile, last_group - group);
      }
}

}  // namespace

// Bytes of scratch: the packed copies, the factors of a and of b, and the starts of b.
extern "C" int64_t count_scratch(int64_t rows, int64_t columns, int64_t length, int64_t run) {
  const Sum sum{length, run, divide_up(length, run)};
  const int64_t left = divide_up(rows, LANES), right = divide_up(columns, LANES);
  return BYTES * ((left + right) * sum.words() + (left + 2 * right) * sum.runs);
}

// Write c.
extern "C" void multiply_runs(const int8_t *a, int64_t rows, int64_t a_step, int64_t a_length_step,
                              const float *a_factors, int64_t a_edge, const int8_t *b, int64_t columns, int64_t b_step,
                              int64_t b_length_step, const float *b_factors, int64_t b_edge, int64_t length,
                              int64_t run, int64_t threads, uint8_t *scratch, float *c) {
  const Sum sum{length, run, divide_up(length, run)};
  Operand left{{a, rows, a_step, a_length_step}, a_factors, a_edge, scratch, nullptr, nullptr};
  Operand right{{b, columns, b_step, b_length_step}, b_factors, b_edge, nullptr, nullptr, nullptr};
  right.packed = left.packed + left.groups() * sum.words() * BYTES;
  left.lanes = reinterpret_cast<float *>(right.packed + right.groups() * sum.words() * BYTES);
  right.lanes = left.lanes + left.groups() * sum.runs * LANES;
  right.start = reinterpret_cast<int32_t *>(right.lanes + right.groups() * sum.runs * LANES);
  pack(left, sum, threads);
  pack(right, sum, threads);
  const Product product{left, right, sum, c};
  const int64_t down = divide_up(rows, TASK_ROWS), across = divide_up(right.groups(), TASK_GROUPS);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < down * across; ++task)
    multiply_task(product, task % down * TASK_ROWS, task / down * TASK_GROUPS);
}
#endif
