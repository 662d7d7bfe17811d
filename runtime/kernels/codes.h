// What the kernels of codes share: words of neighboring codes, a lane for each row.
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
inline Ints read_border(const Matrix &x, int64_t first, int64_t k, int64_t count) {
  alignas(64) int8_t words[CODES] = {};
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

// Words of rows; zeros after `count` codes, and after the last row.
inline Ints read_words(const Matrix &x, int64_t first, int64_t k, int64_t count) {
  if (count < WORD || first + LANES > x.outer) return read_border(x, first, k, std::min(count, WORD));
  if (x.step == 1) return read_lines(x, first, k);
  return x.length_step == 1 ? read_rows(x.codes + first * x.step + k, x.step) : read_border(x, first, k, WORD);
}

}  // namespace
#endif
