// What the kernels of codes share: words of neighboring codes, a lane for each row; and scales and zero points of rows.
#include "vectors.h"

#ifdef HAS_VECTORS
namespace {

constexpr int64_t DIMS = 3;

// Codes [outer, length] with strides.
struct Matrix {
  const int8_t *codes;
  int64_t outer, step, length_step;
};

// Words of as many rows as there are lanes, code by code: at the borders, and for strides of any kind.
inline Ints read_border(const Matrix &x, int64_t first, int64_t k, int64_t count, int8_t zero) {
  alignas(64) int8_t words[CODES];
  std::fill_n(words, CODES, zero);
  for (int64_t i = 0; i < std::min(LANES, x.outer - first); ++i)
    for (int64_t j = 0; j < count; ++j) words[i * WORD + j] = x.codes[(first + i) * x.step + (k + j) * x.length_step];
  return read_codes(words);
}

// The same inside, if rows lie side by side.
inline Ints read_lines(const Matrix &x, int64_t first, int64_t k) {
  Line line[WORD];
  for (int64_t j = 0; j < WORD; ++j) line[j] = read_line(x.codes + first + (k + j) * x.length_step);
  return interleave(line);
}

// Words of rows; `zero` after `count` codes, and after the last row.
inline Ints read_words(const Matrix &x, int64_t first, int64_t k, int64_t count, int8_t zero = 0) {
  if (count < WORD || first + LANES > x.outer) return read_border(x, first, k, std::min(count, WORD), zero);
  if (x.step == 1) return read_lines(x, first, k);
  return x.length_step == 1 ? read_rows(x.codes + first * x.step + k, x.step) : read_border(x, first, k, WORD, zero);
}

// One value for every `edge` rows, as the graph holds them.
struct Values {
  const void *data;
  int64_t kind, edge;  // 0: floats; 1: exponents of 8 bits, 255 for NaN; 2: bytes; 3: none, which is zero
  float get_factor(int64_t row) const {
    if (kind == 0) return static_cast<const float *>(data)[row / edge];
    const uint32_t code = get_byte(row), bits = code == 255 ? 0x7fc00000 : code << 23;
    float factor;
    std::memcpy(&factor, &bits, sizeof(factor));
    return factor;
  }
  bool is_there() const { return kind != 3; }
  int32_t get_point(int64_t row) const { return is_there() ? get_byte(row) : 0; }
  uint8_t get_byte(int64_t row) const { return static_cast<const uint8_t *>(data)[row / edge]; }
};

// Sums times two factors, the smaller one first: two roundings.
INLINE Floats scale_sums(Floats sums, Floats a, Floats b) {
  // a comparison with NaN returns the second operand: a NaN of either factor stays in one of both
  return sums * find_least(a, b) * find_most(b, a);
}

}  // namespace
#endif
