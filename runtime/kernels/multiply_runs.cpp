// Products of int8 codes whose scales change along the summed axis: each run of a sum is exact in int32, is scaled, and
// is added in float32.
//
//     c[m, n] = ((0 + t(0)) + t(1)) + …,    t(r) = float(Σ a[m, k]·b[k, n] of run r) · (a_factor[m, r] · b_factor[n, r])
//
// Every operation on floats is rounded by itself, in this order: the result does not depend on blocks or threads.
//
// Both operands are packed alike, into groups of 16 rows of a or columns of b: 64 bytes hold 4 neighboring codes of the
// summed axis of all 16, as vpdpbusd reads them. That instruction multiplies unsigned by signed bytes. So 128 is added
// to the codes of a, and the sum of a run starts at −128·Σ b.
#include "codes.h"

#ifndef __AVX512VNNI__
extern "C" void multiply_runs() {}
#else
namespace {

constexpr int64_t ROWS = 8, VECTORS = 3;
constexpr int64_t DEPTH = 1024;      // codes of the summed axis at a time, with
constexpr int64_t TASK_GROUPS = 48;  // groups of b: 768 columns, 768 KiB, stay in the second cache for
constexpr int64_t TASK_ROWS = 64;    // rows of a after each other

// A matrix of codes, and where its packed copy is.
struct Operand {
  Matrix matrix;
  const float *factors;  // [blocks of outer, runs]
  int64_t edge;          // neighbors along outer that share a factor
  int8_t *packed;        // [groups, quads, 16, 4]
  float *lanes;          // [groups, runs, 16]: the factor of every row or column
  int32_t *start;        // [groups, runs, 16]: where the sum of a run begins; null: no shift
  int64_t groups() const { return divide_up(matrix.outer, LANES); }
};

struct Sum {
  int64_t length, run, runs;
  int64_t quads_of(int64_t r) const { return divide_up(std::min(run, length - r * run), FOUR); }
  int64_t quads_before(int64_t r) const { return r * divide_up(run, FOUR); }
  int64_t quads() const { return quads_before(runs - 1) + quads_of(runs - 1); }
};

void pack_run(const Operand &x, const Sum &sum, int64_t group, int64_t r) {
  const __m512i shift = _mm512_set1_epi8(-128);
  const int64_t end = std::min((r + 1) * sum.run, sum.length), at = group * sum.runs + r;
  int8_t *to = x.packed + (group * sum.quads() + sum.quads_before(r)) * LANES * FOUR;
  __m512i total = _mm512_setzero_si512();
  for (int64_t k = r * sum.run; k < end; k += FOUR, to += LANES * FOUR) {
    const __m512i quad = read_quad(x.matrix, group * LANES, k, end - k);
    total = _mm512_dpbusd_epi32(total, shift, quad);  // the byte of −128 is 128 as an unsigned one
    _mm512_storeu_si512(to, x.start ? quad : _mm512_xor_si512(quad, shift));
  }
  if (x.start) _mm512_storeu_si512(x.start + at * LANES, _mm512_sub_epi32(_mm512_setzero_si512(), total));
  for (int64_t i = 0; i < LANES; ++i) {
    const int64_t row = std::min(group * LANES + i, x.matrix.outer - 1);
    x.lanes[at * LANES + i] = x.factors[row / x.edge * sum.runs + r];
  }
}

// Pack 4 groups run by run: in lines, they are 64 bytes side by side.
void pack(const Operand &x, const Sum &sum, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < x.groups(); first += FOUR)
    for (int64_t r = 0; r < sum.runs; ++r)
      for (int64_t group = first; group < std::min(first + FOUR, x.groups()); ++group) pack_run(x, sum, group, r);
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

// Sum one run of 8 rows and N groups of columns.
template <int64_t N>
INLINE void sum_run(const Product &p, const Tile &tile, int64_t r, __m512i (&sums)[ROWS][N]) {
  const int64_t quads = p.sum.quads(), skip = p.sum.quads_before(r), count = p.sum.quads_of(r);
  const int8_t *a = p.a.packed + ((tile.row / LANES * quads + skip) * LANES + tile.row % LANES) * FOUR;
  const int8_t *b = p.b.packed + (tile.group * quads + skip) * LANES * FOUR;
  for (int64_t v = 0; v < N; ++v) {
    const __m512i start = _mm512_loadu_si512(p.b.start + ((tile.group + v) * p.sum.runs + r) * LANES);
    for (int64_t i = 0; i < ROWS; ++i) sums[i][v] = start;
  }
  for (int64_t q = 0; q < count; ++q) {
    __m512i columns[N];
    for (int64_t v = 0; v < N; ++v) columns[v] = _mm512_loadu_si512(b + (v * quads + q) * LANES * FOUR);
    for (int64_t i = 0; i < ROWS; ++i) {
      int32_t word;
      std::memcpy(&word, a + (q * LANES + i) * FOUR, FOUR);
      const __m512i row = _mm512_set1_epi32(word);
      for (int64_t v = 0; v < N; ++v) add_products(sums[i][v], row, columns[v]);
    }
  }
}

// Scale the sums of one run and add them. If all rows share a factor, it meets that of a column once.
template <int64_t N, bool IS_SHARED>
INLINE void add_run(const Product &p, const Tile &tile, int64_t r, const __m512i (&sums)[ROWS][N], Total<N> &total) {
  const float *of_rows = p.a.lanes + (tile.row / LANES * p.sum.runs + r) * LANES + tile.row % LANES;
  for (int64_t v = 0; v < N; ++v) {
    const __m512 of_columns = _mm512_loadu_ps(p.b.lanes + ((tile.group + v) * p.sum.runs + r) * LANES);
    const __m512 shared = _mm512_mul_ps(_mm512_set1_ps(of_rows[0]), of_columns);
    for (int64_t i = 0; i < ROWS; ++i) {
      const __m512 factor = IS_SHARED ? shared : _mm512_mul_ps(_mm512_set1_ps(of_rows[i]), of_columns);
      const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][v]), factor);
      _mm512_store_ps(total[i][v], _mm512_add_ps(_mm512_load_ps(total[i][v]), term));
    }
  }
}

// Add some runs of 8 rows and N groups of columns to c.
template <int64_t N, bool IS_SHARED>
void multiply_tile(const Product &p, const Tile &tile) {
  const int64_t columns = p.b.matrix.outer;
  float *c = p.c + tile.row * columns + tile.group * LANES;
  alignas(64) Total<N> total = {};
  __mmask16 mask[N];
  for (int64_t v = 0; v < N; ++v) mask[v] = (1u << std::min(LANES, columns - (tile.group + v) * LANES)) - 1;
  for (int64_t i = 0; i < (tile.from > 0 ? tile.rows : 0); ++i)
    for (int64_t v = 0; v < N; ++v)
      _mm512_store_ps(total[i][v], _mm512_maskz_loadu_ps(mask[v], c + i * columns + v * LANES));
  for (int64_t r = tile.from; r < tile.to; ++r) {
    __m512i sums[ROWS][N];
    sum_run<N>(p, tile, r, sums);
    add_run<N, IS_SHARED>(p, tile, r, sums, total);
  }
  for (int64_t i = 0; i < tile.rows; ++i)
    for (int64_t v = 0; v < N; ++v)
      _mm512_mask_storeu_ps(c + i * columns + v * LANES, mask[v], _mm512_load_ps(total[i][v]));
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

// Write c. `scratch` holds the packed copies: 64 bytes for each group and quad, and 64 bytes for each group and run,
// once for a (factors) and twice for b (factors and starts).
extern "C" void multiply_runs(const int8_t *a, int64_t rows, int64_t a_step, int64_t a_length_step,
                              const float *a_factors, int64_t a_edge, const int8_t *b, int64_t columns, int64_t b_step,
                              int64_t b_length_step, const float *b_factors, int64_t b_edge, int64_t length,
                              int64_t run, int64_t threads, int8_t *scratch, float *c) {
  const Sum sum{length, run, divide_up(length, run)};
  const int64_t bytes = LANES * FOUR;
  Operand left{{a, rows, a_step, a_length_step}, a_factors, a_edge, scratch, nullptr, nullptr};
  Operand right{{b, columns, b_step, b_length_step}, b_factors, b_edge, nullptr, nullptr, nullptr};
  right.packed = left.packed + left.groups() * sum.quads() * bytes;
  left.lanes = reinterpret_cast<float *>(right.packed + right.groups() * sum.quads() * bytes);
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
