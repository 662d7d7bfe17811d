// Images of codes, and the positions that a convolution reads. For each dimension of space: at position t, tap u the
// index start + step·t + dilation·u. Space has 3 dimensions; the first ones have one element where it has fewer.

#ifdef __AVX512VNNI__
namespace {

struct Image {
  const int8_t *codes;
  int64_t samples, channels, space[DIMS], stride[2 + DIMS];
  int64_t flip;  // 128: bytes are copied with the highest bit turned, between signed and unsigned
};

struct Windows {
  int64_t start[DIMS], count[DIMS], step[DIMS], taps[DIMS], dilation[DIMS];
  // Indices from the first to the last that some positions read.
  int64_t reach(int64_t dim, int64_t positions) const {
    return step[dim] * (positions - 1) + dilation[dim] * (taps[dim] - 1) + 1;
  }
};

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
  int32_t get_point(int64_t row) const { return kind == 3 ? 0 : get_byte(row); }
  uint8_t get_byte(int64_t row) const { return static_cast<const uint8_t *>(data)[row / edge]; }
};

// Call f with the constants 0 … N − 1. Sums that loops index would leave the registers.
template <typename F, int... I>
INLINE void each_of(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
INLINE void each(F f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

// 16 lines of 16 elements → the 16 columns. A step interleaves line i with line i + 8, which halves the distance of
// neighbors: four of them turn the square.
template <typename Line, typename Low, typename High>
INLINE void turn_square(Line (&line)[LANES], Low interleave_low, High interleave_high) {
  each<4>([&](auto) __attribute__((always_inline)) {
    Line next[LANES];
    each<8>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = interleave_low(line[i], line[i + 8]);
      next[2 * i + 1] = interleave_high(line[i], line[i + 8]);
    });
    each<16>([&](auto i) __attribute__((always_inline)) { line[i] = next[i]; });
  });
}

INLINE void turn_floats(__m512 (&line)[LANES]) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  turn_square(
      line, [&](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_permutex2var_ps(a, low, b); },
      [&](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_permutex2var_ps(a, high, b); });
}

INLINE void turn_bytes(__m128i (&line)[LANES]) {
  turn_square(
      line, [](__m128i a, __m128i b) __attribute__((always_inline)) { return _mm_unpacklo_epi8(a, b); },
      [](__m128i a, __m128i b) __attribute__((always_inline)) { return _mm_unpackhi_epi8(a, b); });
}

// 0, step, 2·step …
inline __m512i scale_lanes(int64_t step) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int32_t(step)));
}

inline __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

// Floats that are `step` apart in memory, and the way back.
INLINE __m512 load_lanes(const float *from, int64_t step, __mmask16 mask) {
  if (step == 1) return _mm512_maskz_loadu_ps(mask, from);
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, scale_lanes(step), from, sizeof(float));
}

INLINE void store_lanes(float *to, int64_t step, __mmask16 mask, __m512 values) {
  if (step != 1)
    _mm512_mask_i32scatter_ps(to, mask, scale_lanes(step), values, sizeof(float));
  else if (mask == 0xffff)
    _mm512_storeu_ps(to, values);
  else
    _mm512_mask_storeu_ps(to, mask, values);
}

// Sums times two factors, the smaller one first: two roundings.
INLINE __m512 scale_sums(__m512 sums, __m512 a, __m512 b) {
  // a comparison with NaN returns the second operand: a NaN of either factor stays in one of both
  return _mm512_mul_ps(_mm512_mul_ps(sums, _mm512_min_ps(a, b)), _mm512_max_ps(b, a));
}

// Copy neighbors of a row whose channels lie side by side.
inline void copy_lines(const Image &x, const int8_t *from, int64_t count, int64_t pitch, uint8_t *to) {
  const __m512i flip = _mm512_set1_epi8(char(x.flip));
  const bool is_dense = x.stride[4] == x.channels && pitch == x.channels;
  const int64_t lines = is_dense ? 1 : count, length = is_dense ? count * x.channels : x.channels;
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t c = 0; c < length; c += 64) {
      const int8_t *bytes = from + i * x.stride[4] + c;
      uint8_t *copy = to + i * pitch + c;
      if (length - c >= 64) {  // masks take the processor several times as long
        _mm512_storeu_si512(copy, _mm512_xor_si512(_mm512_loadu_si512(bytes), flip));
      } else {
        const __mmask64 mask = (1ull << (length - c)) - 1;
        _mm512_mask_storeu_epi8(copy, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, bytes), flip));
      }
    }
}

// Copy neighbors of a row that lie side by side, channel by channel: squares of 16 × 16 are turned.
inline void turn_lines(const Image &x, const int8_t *from, int64_t count, int64_t pitch, uint8_t *to) {
  const __m128i flip = _mm_set1_epi8(char(x.flip));
  for (int64_t c = 0; c < x.channels; c += LANES)
    for (int64_t i = 0; i < count; i += LANES) {
      __m128i line[LANES];
      const __mmask16 inner = first_lanes(count - i), outer = first_lanes(x.channels - c);
      for (int64_t k = 0; k < LANES; ++k)
        line[k] = outer >> k & 1 ? _mm_maskz_loadu_epi8(inner, from + (c + k) * x.stride[1] + i) : _mm_setzero_si128();
      turn_bytes(line);
      for (int64_t k = 0; k < std::min(LANES, count - i); ++k) {
        uint8_t *copy = to + (i + k) * pitch + c;
        if (outer == 0xffff)
          _mm_storeu_si128(reinterpret_cast<__m128i *>(copy), _mm_xor_si128(line[k], flip));
        else
          _mm_mask_storeu_epi8(copy, outer, _mm_xor_si128(line[k], flip));
      }
    }
}

// Copy the row [first, first + length) of a sample as [length, pitch], and the byte `zero` outside of the image.
inline void copy_row(const Image &x, int32_t zero, int64_t sample, int64_t depth, int64_t row, int64_t first,
                     int64_t length, int64_t pitch, uint8_t *to) {
  if (depth < 0 || depth >= x.space[0] || row < 0 || row >= x.space[1]) {
    std::memset(to, zero, length * pitch);
    return;
  }
  const int64_t low = std::clamp<int64_t>(-first, 0, length), high = std::clamp<int64_t>(x.space[2] - first, low, length);
  std::memset(to, zero, low * pitch);
  std::memset(to + high * pitch, zero, (length - high) * pitch);
  const int8_t *from = x.codes + sample * x.stride[0] + depth * x.stride[2] + row * x.stride[3];
  from += (first + low) * x.stride[4];
  (x.stride[1] == 1 ? copy_lines : turn_lines)(x, from, high - low, pitch, to + low * pitch);
}

}  // namespace
#endif
