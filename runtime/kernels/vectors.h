// Vectors of this processor. A lane holds a sum of 32 bits, or a word: neighboring codes along the summed axis. With
// AVX-512 VNNI a vector has 16 lanes, and words of 4 bytes. With AVX2 it has 8 lanes, and words of 2 codes of 16 bits:
// sums of two products of bytes can leave 16 bits, where the instruction for bytes saturates.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define HAS_VECTORS
#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))  // so that sums stay in registers

namespace {

#ifdef __AVX512VNNI__
constexpr int64_t LANES = 16, WORD = 4;
using Code = uint8_t;  // of packed codes; the bits of a signed byte are the same
using Mask = __mmask16;
#else
constexpr int64_t LANES = 8, WORD = 2;
using Code = int16_t;
using Mask = int32_t __attribute__((vector_size(4 * LANES)));  // −1: a lane counts
#endif
constexpr int64_t BYTES = 4 * LANES;  // of a vector
// Steps of a loop over words that are written out. With AVX-512 VNNI GCC 12 keeps the sums of two steps in two places, of
// which one is memory: 512·1024·4096 products took 8.0 ms in place of 5.0.
constexpr int UNROLL = LANES == 16 ? 1 : 2;
constexpr int64_t CODES = WORD * LANES;
using Signed = int32_t __attribute__((vector_size(BYTES)));
using Ints = uint32_t __attribute__((vector_size(BYTES)));  // signed too, but terms of a sum may wrap around
using Floats = float __attribute__((vector_size(BYTES)));
using Line = __m128i;  // codes of all lanes

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Call f with the constants 0 … N − 1. Sums that loops index would leave the registers.
template <typename F, int... I>
INLINE void each_of(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
INLINE void each(F f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

template <typename Vector>
INLINE Vector load(const void *from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// Fetch what a loop reads some bytes later: a processor fetches ahead by itself, but no further than a page of 4096 bytes.
INLINE void fetch(const int8_t *from, int64_t bytes) { __builtin_prefetch(reinterpret_cast<void *>(uintptr_t(from) + bytes)); }

// Words in a register of their own: GCC 12 would read them again for each product.
INLINE Ints load_words(const uint8_t *from) {
  Ints words = load<Ints>(from);
  asm("" : "+v"(words));
  return words;
}

template <typename Vector>
INLINE void store(void *to, Vector vector) {
  std::memcpy(to, &vector, sizeof(Vector));
}

INLINE Ints spread(int32_t value) { return uint32_t(value) + Ints{}; }
INLINE Floats spread(float value) { return value - Floats{}; }  // −0 stays −0
INLINE Floats to_floats(Ints ints) { return __builtin_convertvector((Signed)ints, Floats); }

// Of bfloat16: the upper half of a float32, to nearest even.
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
INLINE Shorts to_shorts(Floats floats) {
  const Ints bits = (Ints)floats, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(floats == floats ? rounded : spread(0x7fc0), Shorts);
}

// A word of equal codes, in all lanes.
INLINE Ints spread_code(int32_t code) { return spread(WORD == 4 ? code * 0x01010101 : code * 0x00010001); }

// The word at an address, in all lanes.
INLINE Ints spread_word(const Code *from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return spread(word);
}

inline Signed count_lanes() {
  Signed lanes{};
  for (int64_t i = 0; i < LANES; ++i) lanes[i] = int32_t(i);
  return lanes;
}

// Lines with N elements of a vector, N of them → the N columns. A step interleaves line i with line i + N / 2, which
// halves the distance of neighbors: with N = 2^STEPS, that many steps turn the square.
template <int STEPS, typename Element, typename Low, typename High>
INLINE void turn_square(Element (&line)[1 << STEPS], Low interleave_low, High interleave_high) {
  constexpr int N = 1 << STEPS;
  each<STEPS>([&](auto) __attribute__((always_inline)) {
    Element next[N];
    each<N / 2>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = interleave_low(line[i], line[i + N / 2]);
      next[2 * i + 1] = interleave_high(line[i], line[i + N / 2]);
    });
    each<N>([&](auto i) __attribute__((always_inline)) { line[i] = next[i]; });
  });
}

// 16 lines of 16 bytes → the 16 columns.
INLINE void turn_bytes(__m128i (&line)[16]) {
  turn_square<4>(
      line, [](__m128i a, __m128i b) __attribute__((always_inline)) { return _mm_unpacklo_epi8(a, b); },
      [](__m128i a, __m128i b) __attribute__((always_inline)) { return _mm_unpackhi_epi8(a, b); });
}

#ifdef __AVX512VNNI__

// Add the products of the codes of a word in every lane. As an intrinsic, GCC 12 copies every sum once in each step.
INLINE void add_products(Ints &sum, Ints unsigned_words, Ints signed_words) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_words), "v"(signed_words));
}

// Bytes as the dot product takes them, unsigned or signed: 128 is added to signed ones, or subtracted from unsigned ones.
INLINE Ints make_unsigned(Ints words, bool is_signed) { return is_signed ? words ^ spread_code(0x80) : words; }
INLINE Ints make_signed(Ints words, bool is_signed) { return is_signed ? words : words ^ spread_code(0x80); }

// Codes of words, one after the other, as vectors.
INLINE Ints read_codes(const int8_t *codes) { return load<Ints>(codes); }

// The same of words that are `step` apart.
INLINE Ints read_rows(const int8_t *codes, int64_t step) {
  int32_t words[LANES];
  for (int64_t i = 0; i < LANES; ++i) std::memcpy(words + i, codes + i * step, WORD);
  return load<Ints>(words);
}

// A code of each lane, side by side.
INLINE Line read_line(const int8_t *codes) { return load<Line>(codes); }

// Lines of one code after the other → words.
INLINE Ints interleave(const Line (&line)[WORD]) {
  // 4 codes of each line become neighbors, then these are turned
  const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i turned = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i lines = _mm512_castsi128_si512(line[0]);
  each<3>([&](auto i) __attribute__((always_inline)) { lines = _mm512_inserti32x4(lines, line[i + 1], i + 1); });
  return (Ints)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, lines), turned);
}

INLINE Floats find_least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats find_most(Floats a, Floats b) { return _mm512_max_ps(a, b); }

INLINE Mask first_lanes(int64_t count) { return count >= LANES ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }
INLINE Mask lanes_between(int64_t from, int64_t to) { return first_lanes(to) & ~first_lanes(from); }
INLINE bool is_full(Mask mask) { return mask == 0xffff; }
INLINE bool has_lane(Mask mask, int64_t lane) { return mask >> lane & 1; }
INLINE Floats load_floats(Mask mask, const float *from) { return _mm512_maskz_loadu_ps(mask, from); }
INLINE void store_part(Mask mask, float *to, Floats values) { _mm512_mask_storeu_ps(to, mask, values); }

// Floats that are `step` apart in memory, and the way back.
INLINE Floats gather(Mask mask, const float *from, int64_t step) {
  const __m512i places = (__m512i)(count_lanes() * int32_t(step));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, places, from, sizeof(float));
}
INLINE void scatter(Mask mask, float *to, int64_t step, Floats values) {
  _mm512_mask_i32scatter_ps(to, mask, (__m512i)(count_lanes() * int32_t(step)), values, sizeof(float));
}

INLINE void turn_floats(Floats (&line)[LANES]) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  turn_square<4>(
      line, [&](Floats a, Floats b) __attribute__((always_inline)) { return (Floats)_mm512_permutex2var_ps(a, low, b); },
      [&](Floats a, Floats b) __attribute__((always_inline)) { return (Floats)_mm512_permutex2var_ps(a, high, b); });
}

// As many words of each row as are read at once: 16 rows of a cache line.
constexpr int SQUARE = LANES;
INLINE void read_square(const int8_t *codes, int64_t step, Ints (&words)[SQUARE]) {
  Floats line[LANES];
  for (int64_t i = 0; i < SQUARE; ++i) line[i] = load<Floats>(codes + i * step);
  turn_floats(line);
  for (int64_t i = 0; i < SQUARE; ++i) words[i] = (Ints)line[i];
}

// At most 16 bytes, then zeros, and the way back.
INLINE __m128i read_bytes(const int8_t *from, int64_t count) { return _mm_maskz_loadu_epi8(first_lanes(count), from); }
template <typename Byte>
INLINE void write_bytes(__m128i bytes, int64_t count, uint8_t *to) {
  if (count >= 16)  // a mask takes the processor several times as long
    store(to, bytes);
  else
    _mm_mask_storeu_epi8(to, first_lanes(count), bytes);
}

#else

INLINE void add_products(Ints &sum, Ints unsigned_words, Ints signed_words) {
  sum += (Ints)_mm256_madd_epi16((__m256i)unsigned_words, (__m256i)signed_words);
}

// Codes were read as if signed.
INLINE Ints make_unsigned(Ints words, bool is_signed) {
  return is_signed ? (Ints)_mm256_add_epi16((__m256i)words, _mm256_set1_epi16(128)) : words & spread_code(0xff);
}
INLINE Ints make_signed(Ints words, bool is_signed) {
  const __m256i codes = (__m256i)(words & spread_code(0xff));
  return is_signed ? words : (Ints)_mm256_sub_epi16(codes, _mm256_set1_epi16(128));
}

INLINE Ints read_codes(const int8_t *codes) { return (Ints)_mm256_cvtepi8_epi16(load<__m128i>(codes)); }

INLINE Ints read_rows(const int8_t *codes, int64_t step) {
  const auto read = [&](int64_t i) __attribute__((always_inline)) { return load<int16_t>(codes + i * step); };
  return (Ints)_mm256_cvtepi8_epi16(_mm_setr_epi16(read(0), read(1), read(2), read(3), read(4), read(5), read(6), read(7)));
}

constexpr int SQUARE = LANES;
INLINE void read_square(const int8_t *codes, int64_t step, Ints (&words)[SQUARE]) {
  __m128i line[SQUARE];
  for (int64_t i = 0; i < SQUARE; ++i) line[i] = load<__m128i>(codes + i * step);
  turn_square<3>(
      line, [](__m128i a, __m128i b) __attribute__((always_inline)) { return _mm_unpacklo_epi16(a, b); },
      [](__m128i a, __m128i b) __attribute__((always_inline)) { return _mm_unpackhi_epi16(a, b); });
  for (int64_t i = 0; i < SQUARE; ++i) words[i] = (Ints)_mm256_cvtepi8_epi16(line[i]);
}

INLINE Line read_line(const int8_t *codes) {
  return _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)));
}

INLINE Ints interleave(const Line (&line)[WORD]) {
  const __m128i low = _mm_unpacklo_epi16(line[0], line[1]), high = _mm_unpackhi_epi16(line[0], line[1]);
  return (Ints)_mm256_set_m128i(high, low);
}

INLINE Floats find_least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
INLINE Floats find_most(Floats a, Floats b) { return _mm256_max_ps(a, b); }

INLINE Mask lanes_between(int64_t from, int64_t to) {
  return (count_lanes() >= int32_t(from)) & (count_lanes() < int32_t(std::min(to, LANES)));
}
INLINE Mask first_lanes(int64_t count) { return lanes_between(0, count); }
INLINE bool is_full(Mask mask) { return _mm256_movemask_ps((__m256)mask) == 0xff; }
INLINE bool has_lane(Mask mask, int64_t lane) { return mask[lane]; }
INLINE Floats load_floats(Mask mask, const float *from) { return _mm256_maskload_ps(from, (__m256i)mask); }
INLINE void store_part(Mask mask, float *to, Floats values) { _mm256_maskstore_ps(to, (__m256i)mask, values); }

INLINE Floats gather(Mask mask, const float *from, int64_t step) {
  const __m256i places = (__m256i)(count_lanes() * int32_t(step));
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, places, (__m256)mask, sizeof(float));
}
INLINE void scatter(Mask mask, float *to, int64_t step, Floats values) {
  for (int64_t i = 0; i < LANES; ++i)
    if (mask[i]) to[i * step] = values[i];
}

INLINE void turn_floats(Floats (&line)[LANES]) {
  const auto interleave = [](Floats a, Floats b, auto half) __attribute__((always_inline)) {
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    return (Floats)_mm256_permute2f128_ps(low, high, half ? 0x31 : 0x20);
  };
  turn_square<3>(
      line,
      [&](Floats a, Floats b) __attribute__((always_inline)) { return interleave(a, b, std::false_type{}); },
      [&](Floats a, Floats b) __attribute__((always_inline)) { return interleave(a, b, std::true_type{}); });
}

INLINE __m128i read_bytes(const int8_t *from, int64_t count) {
  if (count >= 16) return load<__m128i>(from);
  int8_t bytes[16] = {};
  std::memcpy(bytes, from, std::max<int64_t>(count, 0));
  return load<__m128i>(bytes);
}

// Of 8 bits as they are, or of 16 bits by the sign of `Byte`.
template <typename Byte>
INLINE void write_bytes(__m128i bytes, int64_t count, uint8_t *to) {
  if (count >= 16)
    store(to, bytes);
  else
    std::memcpy(to, &bytes, count);
}
template <typename Byte>
INLINE void write_bytes(__m128i bytes, int64_t count, int16_t *to) {
  const __m256i wide = std::is_signed_v<Byte> ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
  if (count >= 16)
    store(to, wide);
  else
    std::memcpy(to, &wide, count * sizeof(int16_t));
}

#endif

// A mask takes the processor several times as long.
INLINE void store_floats(Mask mask, float *to, Floats values) {
  is_full(mask) ? store(to, values) : store_part(mask, to, values);
}

}  // namespace
#endif
