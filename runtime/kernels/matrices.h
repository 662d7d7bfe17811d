// Products of two matrices of codes: both are packed, and the sums of a tile stay in registers.
//
// Both operands are packed alike, into groups of as many rows of a or columns of b as a vector has lanes: a vector holds
// a word of neighboring codes of the summed axis of each. The dot product multiplies unsigned codes, of a, by signed
// codes, of b. So 128 is added to signed codes of a, and subtracted from unsigned ones of b.
#include "codes.h"

#ifdef HAS_VECTORS
namespace {

constexpr int64_t ROWS = LANES == 16 ? 8 : 6;
constexpr int64_t DEPTH = 64 * LANES;  // codes of the summed axis at a time, with
constexpr int64_t TASK_GROUPS = 48;    // groups of b: 768 KiB, or 384 with AVX2, stay in the second cache for
constexpr int64_t TASK_ROWS = 8 * ROWS;  // rows of a after each other

// A matrix of codes, and where its packed copy is.
struct Operand {
  Matrix matrix;
  bool is_signed;   // the given codes
  int32_t weight;   // of the totals
  uint8_t *packed;  // [groups, words] vectors
  int32_t *totals;  // [groups, runs, LANES]: sums of packed codes, times the weight; null: nobody reads them
  int64_t groups() const { return divide_up(matrix.outer, LANES); }
};

struct Sum {
  int64_t length, run, runs;
  int64_t get_length(int64_t r) const { return std::min(run, length - r * run); }
  int64_t words_of(int64_t r) const { return divide_up(get_length(r), WORD); }
  int64_t words_before(int64_t r) const { return r * divide_up(run, WORD); }
  int64_t words() const { return words_before(runs - 1) + words_of(runs - 1); }
};

inline Sum make_sum(int64_t length, int64_t run) { return {length, run, std::max<int64_t>(1, divide_up(length, run))}; }

template <bool IS_LEFT>
INLINE Ints make_packed(const Operand &x, Ints words) {
  return IS_LEFT ? make_unsigned(words, x.is_signed) : make_signed(words, x.is_signed);
}

template <bool IS_LEFT>
INLINE void add_packed(Ints &total, Ints packed) {
  add_products(total, IS_LEFT ? packed : spread_code(1), IS_LEFT ? spread_code(1) : packed);
}

// Pack one run of a group. Codes that are not there become zeros.
template <bool IS_LEFT>
void pack_run(const Operand &x, const Sum &sum, int64_t group, int64_t r) {
  const int64_t end = std::min((r + 1) * sum.run, sum.length), row = group * LANES;
  const int8_t zero = x.is_signed == IS_LEFT ? -128 : 0;
  uint8_t *to = x.packed + (group * sum.words() + sum.words_before(r)) * BYTES;
  Ints total{};
  const auto add = [&](Ints words) __attribute__((always_inline)) {
    const Ints packed = make_packed<IS_LEFT>(x, words);
    add_packed<IS_LEFT>(total, packed);
    store(to, packed);
    to += BYTES;
  };
  const bool is_page = x.matrix.step % 4096 == 0;  // then rows have one place in the first cache, which holds 12 of them
  int64_t k = r * sum.run;
  if (x.matrix.length_step == 1 && row + LANES <= x.matrix.outer)
    for (; k + SQUARE * WORD <= end; k += SQUARE * WORD) {
      Ints words[SQUARE];
      if (!is_page)
        for (int64_t i = LANES; i < LANES + SQUARE; ++i) fetch(x.matrix.codes, (row + i) * x.matrix.step + k);  // the next group
      read_square(x.matrix.codes + row * x.matrix.step + k, x.matrix.step, words);
      each<SQUARE>([&](auto i) __attribute__((always_inline)) { add(words[i]); });
    }
  for (; k < end; k += WORD) add(read_words(x.matrix, row, k, end - k, zero));
  if (x.totals) store(x.totals + (group * sum.runs + r) * LANES, total * spread(x.weight));
}

constexpr int64_t SIDE = 64 / LANES;  // groups whose codes are 64 bytes side by side, in lines
constexpr int64_t FETCHED = 32;       // lines from those that are packed to those that are fetched

// Pack one run of SIDE groups word by word: lines of 4096 bytes that one group reads after the other would leave the
// first cache each time.
template <bool IS_LEFT>
void pack_lines(const Operand &x, const Sum &sum, int64_t first, int64_t r) {
  const int64_t start = r * sum.run, end = start + sum.get_length(r);
  uint8_t *to = x.packed + (first * sum.words() + sum.words_before(r)) * BYTES;
  Ints totals[SIDE] = {};
  for (int64_t k = start; k < end; k += WORD, to += BYTES) {
    for (int64_t i = FETCHED; i < FETCHED + WORD; ++i) fetch(x.matrix.codes, first * LANES + (k + i) * x.matrix.length_step);
    each<SIDE>([&](auto g) __attribute__((always_inline)) {
      const Ints packed = make_packed<IS_LEFT>(x, read_lines(x.matrix, (first + g) * LANES, k));
      add_packed<IS_LEFT>(totals[g], packed);
      store(to + g * sum.words() * BYTES, packed);
    });
  }
  if (x.totals)
    each<SIDE>([&](auto g) __attribute__((always_inline)) {
      store(x.totals + ((first + g) * sum.runs + r) * LANES, totals[g] * spread(x.weight));
    });
}

// Pack some groups run by run: in lines, they are 64 bytes side by side.
template <bool IS_LEFT>
void pack(const Operand &x, const Sum &sum, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < x.groups(); first += SIDE) {
    const bool is_side = x.matrix.step == 1 && (first + SIDE) * LANES <= x.matrix.outer;
    for (int64_t r = 0; r < sum.runs; ++r)
      if (is_side && sum.get_length(r) % WORD == 0)
        pack_lines<IS_LEFT>(x, sum, first, r);
      else
        for (int64_t group = first; group < std::min(first + SIDE, x.groups()); ++group) pack_run<IS_LEFT>(x, sum, group, r);
  }
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

// Where the words or values of a row of a tile begin, in groups of some length. Behind the last row is the last one again.
INLINE int64_t find_row(const Tile &tile, int64_t i, int64_t length, int64_t skip) {
  const int64_t row = LANES % ROWS ? tile.row + std::min(i, tile.rows - 1) : tile.row;
  return (row / LANES * length + skip) * LANES + row % LANES + (LANES % ROWS ? 0 : i);
}

// Where the words of the rows and of N groups of columns of a tile begin.
template <int64_t N>
struct Places {
  const uint8_t *rows[ROWS], *columns[N];
};

template <int64_t N>
INLINE Places<N> find_places(const Product &p, const Tile &tile) {
  const int64_t words = p.sum.words();
  Places<N> places;
  each<ROWS>([&](auto i) __attribute__((always_inline)) {
    places.rows[i] = p.a.packed + find_row(tile, i, words, 0) * WORD * sizeof(Code);
  });
  each<N>([&](auto v) __attribute__((always_inline)) { places.columns[v] = p.b.packed + (tile.group + v) * words * BYTES; });
  return places;
}

// Add one run of a tile. Sums in an array that a loop indexes would be written back after every product.
template <int64_t N>
INLINE void add_run(const Sum &sum, const Places<N> &places, int64_t r, Ints (&given)[ROWS][N]) {
  Ints sums[ROWS][N];
  each<ROWS * N>([&](auto i) __attribute__((always_inline)) { sums[i / N][i % N] = given[i / N][i % N]; });
  int64_t at = sum.words_before(r) * BYTES;  // the same in rows and in columns
#pragma GCC unroll UNROLL
  for (const int64_t end = at + sum.words_of(r) * BYTES; at < end; at += BYTES) {
    Ints columns[N];
    each<N>([&](auto v) __attribute__((always_inline)) { columns[v] = load_words(places.columns[v] + at); });
    each<ROWS>([&](auto i) __attribute__((always_inline)) {
      const Ints word = spread_word(reinterpret_cast<const Code *>(places.rows[i] + at));
      each<N>([&](auto v) __attribute__((always_inline)) { add_products(sums[i][v], word, columns[v]); });
    });
  }
  each<ROWS * N>([&](auto i) __attribute__((always_inline)) { given[i / N][i % N] = sums[i / N][i % N]; });
}

// Multiply some rows and groups of columns, a stretch of the summed axis after the other.
template <typename Rule>
void multiply_task(const Product &p, const Rule &rule, int64_t first_row, int64_t first_group) {
  const int64_t last_row = std::min(first_row + TASK_ROWS, p.a.matrix.outer);
  const int64_t last_group = std::min(first_group + TASK_GROUPS, p.b.groups());
  const int64_t stretch = std::max<int64_t>(1, DEPTH / p.sum.run);
  for (int64_t from = 0; from < p.sum.runs; from += stretch)
    for (int64_t row = first_row; row < last_row; row += ROWS)
      for (int64_t group = first_group; group < last_group; group += Rule::VECTORS) {
        const Tile tile{row, std::min(ROWS, last_row - row), group, from, std::min(from + stretch, p.sum.runs)};
        switch (last_group - group) {
          case 1: rule.template multiply_tile<1>(p, tile); break;
          case 2: rule.template multiply_tile<2>(p, tile); break;
          default: rule.template multiply_tile<Rule::VECTORS>(p, tile);
        }
      }
}

// Multiply packed operands. A rule computes tiles: rule.multiply_tile<groups>(product, tile).
template <typename Rule>
void multiply_tiles(const Product &p, const Rule &rule, int64_t threads) {
  const int64_t down = divide_up(p.a.matrix.outer, TASK_ROWS), across = divide_up(p.b.groups(), TASK_GROUPS);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < down * across; ++task)
    multiply_task(p, rule, task % down * TASK_ROWS, task / down * TASK_GROUPS);
}

}  // namespace
#endif
