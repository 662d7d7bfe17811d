// What the kernels of codes share: dot products of bytes, and groups of 4 codes of 16 rows.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX512VNNI__
#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))  // so that sums stay in registers

namespace {

constexpr int64_t LANES = 16, FOUR = 4, DIMS = 3;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Add the products of 4 neighbors in every lane. As an intrinsic, GCC 12 copies every sum once in each step.
INLINE void add_products(__m512i &sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// 4 lines of 16 bytes, interleaved: 16 lanes of 4 neighbors.
INLINE __m512i interleave(const __m128i (&line)[FOUR]) {
  const __m128i low = _mm_unpacklo_epi8(line[0], line[1]), high = _mm_unpackhi_epi8(line[0], line[1]);
  const __m128i low2 = _mm_unpacklo_epi8(line[2], line[3]), high2 = _mm_unpackhi_epi8(line[2], line[3]);
  __m512i quad = _mm512_castsi128_si512(_mm_unpacklo_epi16(low, low2));
  quad = _mm512_inserti32x4(quad, _mm_unpackhi_epi16(low, low2), 1);
  quad = _mm512_inserti32x4(quad, _mm_unpacklo_epi16(high, high2), 2);
  return _mm512_inserti32x4(quad, _mm_unpackhi_epi16(high, high2), 3);
}

// Codes [outer, length] with strides.
struct Matrix {
  const int8_t *codes;
  int64_t outer, step, length_step;
};

// 4 codes of each of 16 rows, code by code: at the borders, and for strides of any kind.
inline __m512i read_border(const Matrix &x, int64_t first, int64_t k, int64_t count) {
  alignas(64) int8_t quad[LANES * FOUR] = {};
  for (int64_t i = 0; i < std::min(LANES, x.outer - first); ++i)
    for (int64_t j = 0; j < count; ++j) quad[i * FOUR + j] = x.codes[(first + i) * x.step + (k + j) * x.length_step];
  return _mm512_load_si512(quad);
}

// The same inside, if rows lie side by side.
inline __m512i read_lines(const Matrix &x, int64_t first, int64_t k) {
  __m128i line[FOUR];
  for (int64_t j = 0; j < FOUR; ++j)
    line[j] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x.codes + first + (k + j) * x.length_step));
  return interleave(line);
}

// The same inside, if the codes of a row lie side by side: 16 words of 4 bytes.
inline __m512i read_words(const Matrix &x, int64_t first, int64_t k) {
  alignas(64) int32_t quad[LANES];
  for (int64_t i = 0; i < LANES; ++i) std::memcpy(quad + i, x.codes + (first + i) * x.step + k, FOUR);
  return _mm512_load_si512(quad);
}

// 4 codes of each of 16 rows; zeros after `count` codes, and after the last row.
inline __m512i read_quad(const Matrix &x, int64_t first, int64_t k, int64_t count) {
  if (count < FOUR || first + LANES > x.outer) return read_border(x, first, k, std::min(count, FOUR));
  if (x.step == 1) return read_lines(x, first, k);
  return x.length_step == 1 ? read_words(x, first, k) : read_border(x, first, k, FOUR);
}

}  // namespace
#endif
