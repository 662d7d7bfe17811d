// Products of int8 codes whose scales change along the summed axis: each run of a sum is exact in int32, is scaled, and
// is added in float32.
//
//     c[m, n] = ((0 + t(0)) + t(1)) + …,    t(r) = float(Σ a[m, k]·b[k, n] of run r) · (a_factor[m, r] · b_factor[n, r])
//
// Every operation on floats is rounded by itself, in this order: the result does not depend on blocks or threads.
// As 128 is added to the codes of a, the sum of a run starts at −128·Σ b.
#include "matrices.h"

#ifndef HAS_VECTORS
extern "C" void multiply_runs() {}
extern "C" void count_scratch() {}
#else
namespace {

struct Factors {
  const float *given;  // [blocks of outer, runs]
  int64_t edge;        // neighbors along outer that share a factor
  float *lanes;        // [groups, runs, LANES]: the factor of every row or column
};

void spread_factors(const Factors &factors, const Operand &x, const Sum &sum, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < x.groups(); ++group)
    for (int64_t r = 0; r < sum.runs; ++r)
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t row = std::min(group * LANES + i, x.matrix.outer - 1);
        factors.lanes[(group * sum.runs + r) * LANES + i] = factors.given[row / factors.edge * sum.runs + r];
      }
}

template <int64_t N>
using Totals = Floats[ROWS][N];

struct Runs {
  static constexpr int64_t VECTORS = 2;  // groups of columns of a tile, whose sums and totals fill the registers
  Factors a, b;

  // Scale the sums of one run and add them. If all rows share a factor, it meets that of a column once.
  template <int64_t N, bool IS_SHARED>
  INLINE void scale_run(const Product &p, const Tile &tile, int64_t r, const Ints (&sums)[ROWS][N], Totals<N> &totals) const {
    const auto spread_factor = [&](int64_t i) __attribute__((always_inline)) {
      return spread(a.lanes[find_row(tile, i, p.sum.runs, r)]);
    };
    each<N>([&](auto v) __attribute__((always_inline)) {
      const Floats of_columns = load<Floats>(b.lanes + ((tile.group + v) * p.sum.runs + r) * LANES);
      const Floats shared = spread_factor(0) * of_columns;
      each<ROWS>([&](auto i) __attribute__((always_inline)) {
        const Floats factor = IS_SHARED ? shared : spread_factor(i) * of_columns;
        totals[i][v] += to_floats(sums[i][v]) * factor;
      });
    });
  }

  // Add some runs of some rows and N groups of columns to c.
  template <int64_t N, bool IS_SHARED>
  void add_runs(const Product &p, const Tile &tile) const {
    const int64_t columns = p.b.matrix.outer;
    float *c = p.c + tile.row * columns + tile.group * LANES;
    Totals<N> totals = {};
    Mask mask[N];
    for (int64_t v = 0; v < N; ++v) mask[v] = first_lanes(columns - (tile.group + v) * LANES);
    if (tile.from > 0)
      each<ROWS>([&](auto i) __attribute__((always_inline)) {
        const float *row = c + std::min<int64_t>(i, tile.rows - 1) * columns;
        each<N>([&](auto v) __attribute__((always_inline)) { totals[i][v] = load_floats(mask[v], row + v * LANES); });
      });
    const Places<N> places = find_places<N>(p, tile);
    for (int64_t r = tile.from; r < tile.to; ++r) {
      Ints sums[ROWS][N];
      each<N>([&](auto v) __attribute__((always_inline)) {
        const Ints start = load<Ints>(p.b.totals + ((tile.group + v) * p.sum.runs + r) * LANES);
        each<ROWS>([&](auto i) __attribute__((always_inline)) { sums[i][v] = start; });
      });
      add_run<N>(p.sum, places, r, sums);
      scale_run<N, IS_SHARED>(p, tile, r, sums, totals);
    }
    each<ROWS>([&](auto i) __attribute__((always_inline)) {
      each<N>([&](auto v) __attribute__((always_inline)) {
        if (i < tile.rows) store_floats(mask[v], c + i * columns + v * LANES, totals[i][v]);
      });
    });
  }

  template <int64_t N>
  void multiply_tile(const Product &p, const Tile &tile) const {
    const bool is_shared = tile.row / a.edge == (tile.row + tile.rows - 1) / a.edge;
    is_shared ? add_runs<N, true>(p, tile) : add_runs<N, false>(p, tile);
  }
};

struct Side {
  Matrix matrix;
  const float *factors;
  int64_t edge;
};

struct Call {
  Side a, b;
  int64_t length, run, threads;
  uint8_t *scratch;
  float *c;
};

}  // namespace

// Bytes of scratch: the packed copies, the factors of a and of b, and the totals of b.
extern "C" int64_t count_scratch(const Call *call) {
  const Sum sum = make_sum(call->length, call->run);
  const int64_t left = divide_up(call->a.matrix.outer, LANES), right = divide_up(call->b.matrix.outer, LANES);
  return BYTES * ((left + right) * sum.words() + (left + 2 * right) * sum.runs);
}

// Write c.
extern "C" void multiply_runs(const Call *given) {
  const auto &[a, b, length, run, threads, scratch, c] = *given;
  const Sum sum = make_sum(length, run);
  Product p{{a.matrix, true, 0, scratch, nullptr}, {b.matrix, true, -128}, sum, c};
  p.b.packed = p.a.packed + p.a.groups() * sum.words() * BYTES;
  Runs rule{{a.factors, a.edge}, {b.factors, b.edge}};
  rule.a.lanes = reinterpret_cast<float *>(p.b.packed + p.b.groups() * sum.words() * BYTES);
  rule.b.lanes = rule.a.lanes + p.a.groups() * sum.runs * LANES;
  p.b.totals = reinterpret_cast<int32_t *>(rule.b.lanes + p.b.groups() * sum.runs * LANES);
  pack<true>(p.a, sum, threads);
  pack<false>(p.b, sum, threads);
  spread_factors(rule.a, p.a, sum, threads);
  spread_factors(rule.b, p.b, sum, threads);
  multiply_tiles(p, rule, threads);
}
#endif
