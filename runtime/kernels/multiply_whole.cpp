// Products of codes of 8 bits, with zero points: sums are exact, in int32 or, if they are long, in int64; each is scaled
// once.
//
//     c[m, n] = float(Σ (a[m, k] − a's zero)·(b[k, n] − b's zero)) · min(a's factor, b's factor) · max(…) + bias[n]
//
// Every operation on floats is rounded by itself. A scale and a zero point hold for some rows, or some columns. With u
// and s, the packed codes, and their zeros p and q:
//     Σ (u − p)·(s − q) = Σ u·s − p·Σ s − (Σ u − length·p)·q.
// Terms can wrap around, the sum of all of them does not. Stretch by stretch of the summed axis, a sum is left in c as it
// is, or beside c if it needs int64.
#include "matrices.h"

#ifndef HAS_VECTORS
extern "C" void multiply_whole() {}
extern "C" void count_scratch() {}
#else
namespace {

// An operand as it is given.
struct Side {
  const int8_t *codes;
  int64_t outer, step, length_step;
  int64_t is_signed;
  Values scale, point;
  int64_t offset;  // of the zero point, after signed codes were made unsigned ones
};

struct Call {
  Side a, b;
  const float *bias;  // for every column, or null
  int64_t length, threads;
  uint8_t *scratch;
  float *c;
};

constexpr int64_t SPARE = LANES;  // values behind the last group, which a tile of rows may reach
constexpr int64_t MOST = 33025;   // products of at most 255², whose sum int32 holds

// What is known of every row of a, or of every column of b.
struct Lines {
  float *factor;
  int32_t *zero, *total;  // the code of zero, and the sum of the packed codes
  int32_t *rest;          // of rows: Σ u − length·p
};

// Find the values of all lines of an operand, whose totals are those of every run.
void fill_lines(const Lines &lines, const Side &side, const Operand &x, const Sum &sum, int32_t offset) {
  const int64_t count = x.groups() * LANES, edge = std::min(side.scale.edge, count);
  for (int64_t first = 0; first < count; first += edge) {
    const int64_t row = std::min(first, side.outer - 1), size = std::min(edge, count - first);
    std::fill_n(lines.factor + first, size, side.scale.get_factor(row));
    std::fill_n(lines.zero + first, size, side.point.get_point(row) + offset);
  }
  for (int64_t group = 0; group < x.groups(); ++group) {
    Ints total{};
    for (int64_t r = 0; r < sum.runs; ++r) total += load<Ints>(x.totals + (group * sum.runs + r) * LANES);
    store(lines.total + group * LANES, total);
    store(lines.rest + group * LANES, total - spread(int32_t(sum.length)) * load<Ints>(lines.zero + group * LANES));
  }
}

// Where the values of a tile are written.
struct Target {
  float *values;
  int64_t pitch;  // from row to row
  INLINE void write(int64_t row, int64_t group, Floats floats) const { store(values + row * pitch + group * LANES, floats); }
};

struct Whole {
  static constexpr int64_t VECTORS = LANES == 16 ? 3 : 2;  // groups of columns of a tile, whose sums fill the registers
  Lines a, b;
  bool is_plain;  // rows have one zero, and that of columns is 0
  const float *bias;
  int64_t *wide;  // [rows, columns]; null: sums stay in int32

  template <int64_t N>
  void multiply_tile(const Product &p, const Tile &tile) const {
    wide ? multiply_wide<N>(p, tile) : multiply_narrow<N>(p, tile);
  }

  template <int64_t N>
  void multiply_wide(const Product &p, const Tile &tile) const {
    Ints sums[ROWS][N] = {};
    const Places<N> places = find_places<N>(p, tile);
    for (int64_t r = tile.from; r < tile.to; ++r) add_run<N>(p.sum, places, r, sums);
    const int64_t columns = p.b.matrix.outer, first = tile.group * LANES;
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < std::min(N * LANES, columns - first); ++j) {
        const int64_t row = tile.row + i, column = first + j;
        int64_t &sum = wide[row * columns + column];
        sum = (tile.from > 0 ? sum : 0) + int32_t(sums[i][j / LANES][j % LANES]);
        if (tile.to == p.sum.runs) p.c[row * columns + column] = scale_wide(sum, p.sum.length, row, column);
      }
  }

  float scale_wide(int64_t sum, int64_t length, int64_t row, int64_t column) const {
    const int64_t zero = a.zero[row], rest = a.total[row] - length * zero;
    const float value = float(sum - zero * b.total[column] - rest * b.zero[column]);
    const Floats scaled = scale_sums(spread(value), spread(a.factor[row]), spread(b.factor[column]));
    return bias ? scaled[0] + bias[column] : scaled[0];
  }

  template <int64_t N>
  void multiply_narrow(const Product &p, const Tile &tile) const {
    const int64_t columns = p.b.matrix.outer, first = tile.group * LANES;
    float *c = p.c + tile.row * columns + first;
    Mask mask[N];
    for (int64_t v = 0; v < N; ++v) mask[v] = first_lanes(columns - first - v * LANES);
    Ints sums[ROWS][N] = {};
    if (columns % 1024)  // else the rows of a tile have one place in the first cache, which has room for 12 lines there
      each<ROWS * N>([&](auto i) __attribute__((always_inline)) { __builtin_prefetch(c + i / N * columns + i % N * LANES, 1); });
    if (tile.from > 0)
      each<ROWS>([&](auto i) __attribute__((always_inline)) {
        const float *row = c + std::min<int64_t>(i, tile.rows - 1) * columns;
        each<N>([&](auto v) __attribute__((always_inline)) { sums[i][v] = (Ints)load_floats(mask[v], row + v * LANES); });
      });
    const Places<N> places = find_places<N>(p, tile);
    for (int64_t r = tile.from; r < tile.to; ++r) add_run<N>(p.sum, places, r, sums);
    alignas(64) float beside[ROWS * N * LANES];
    const bool is_whole = tile.rows == ROWS && is_full(mask[N - 1]);
    const Target to = is_whole ? Target{c, columns} : Target{beside, N * LANES};
    if (tile.to < p.sum.runs)
      each<ROWS * N>([&](auto i) __attribute__((always_inline)) { to.write(i / N, i % N, (Floats)sums[i / N][i % N]); });
    else if (bias)
      is_plain ? scale<true, true>(sums, tile.row, first, mask, to) : scale<false, true>(sums, tile.row, first, mask, to);
    else
      is_plain ? scale<true, false>(sums, tile.row, first, mask, to) : scale<false, false>(sums, tile.row, first, mask, to);
    if (!is_whole)
      for (int64_t i = 0; i < tile.rows; ++i)
        std::copy_n(beside + i * N * LANES, std::min(N * LANES, columns - first), c + i * columns);
  }

  // Scale the sums of a tile, less what the zeros add. A tile takes 0.6 of the time of one with a branch for each vector.
  template <bool IS_PLAIN, bool HAS_BIAS, int64_t N>
  INLINE void scale(const Ints (&sums)[ROWS][N], int64_t row, int64_t first, const Mask (&mask)[N], const Target &to) const {
    each<N>([&](auto v) __attribute__((always_inline)) {
      const int64_t column = first + v * LANES;
      const Ints total = load<Ints>(b.total + column), zero = load<Ints>(b.zero + column), less = spread(a.zero[row]) * total;
      const Floats factor = load<Floats>(b.factor + column), one = spread(a.factor[row]);
      const Floats own = HAS_BIAS ? load_floats(mask[v], bias + column) : Floats{};
      each<ROWS>([&](auto i) __attribute__((always_inline)) {
        const Ints taken = IS_PLAIN ? less : spread(a.zero[row + i]) * total + spread(a.rest[row + i]) * zero;
        const Floats value = scale_sums(to_floats(sums[i][v] - taken), IS_PLAIN ? one : spread(a.factor[row + i]), factor);
        to.write(i, v, HAS_BIAS ? value + own : value);
      });
    });
  }
};

Operand describe(const Side &side) { return {{side.codes, side.outer, side.step, side.length_step}, side.is_signed != 0, 1}; }

int64_t count_lines(const Operand &x) { return x.groups() * LANES + SPARE; }

}  // namespace

// Bytes of scratch: sums of int64; for both operands the packed copy, its totals, and four values of each line.
extern "C" int64_t count_scratch(const Call *call) {
  const Sum sum = make_sum(call->length, DEPTH);
  int64_t bytes = call->length > MOST ? call->a.outer * call->b.outer * sizeof(int64_t) : 0;
  for (const Side *side : {&call->a, &call->b}) {
    const Operand x = describe(*side);
    bytes += x.groups() * BYTES * (sum.words() + sum.runs) + 4 * count_lines(x) * sizeof(int32_t);
  }
  return bytes;
}

// Write c.
extern "C" void multiply_whole(const Call *given) {
  const Call &call = *given;
  Product p{describe(call.a), describe(call.b), make_sum(call.length, DEPTH), call.c};
  const bool has_zero = call.b.point.is_there() || !call.b.is_signed || call.b.offset != 128;  // of columns
  const bool is_plain = call.a.scale.edge >= call.a.outer && !has_zero;
  Whole rule{{}, {}, is_plain, call.bias, nullptr};
  uint8_t *free = call.scratch;
  const auto take = [&](auto &values, int64_t count) {
    values = reinterpret_cast<std::remove_reference_t<decltype(values)>>(free);
    free += count * sizeof(*values);
  };
  if (call.length > MOST) take(rule.wide, call.a.outer * call.b.outer);
  for (Operand *x : {&p.a, &p.b}) {
    take(x->packed, x->groups() * p.sum.words() * BYTES);
    take(x->totals, x->groups() * p.sum.runs * LANES);
  }
  for (const auto &[lines, x] : {std::pair{&rule.a, &p.a}, std::pair{&rule.b, &p.b}}) {
    take(lines->factor, count_lines(*x));
    for (int32_t **values : {&lines->zero, &lines->total, &lines->rest}) take(*values, count_lines(*x));
  }
  pack<true>(p.a, p.sum, call.threads);
  pack<false>(p.b, p.sum, call.threads);
  fill_lines(rule.a, call.a, p.a, p.sum, int32_t(call.a.offset));
  fill_lines(rule.b, call.b, p.b, p.sum, int32_t(call.b.offset) - 128);
  multiply_tiles(p, rule, call.threads);
}
#endif
