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

// Call f with the constants 0 … N − 1. Sums that loops index would leave the registers.
template <typename F, int... I>
INLINE void each_of(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
INLINE void each(F f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

// 16 lines of 16 floats → the 16 columns.
INLINE void turn_floats(__m512 (&line)[LANES]) {
  // the same steps as below: each pairs line i with line i + 8
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  each<4>([&](auto) __attribute__((always_inline)) {
    __m512 next[LANES];
    each<8>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = _mm512_permutex2var_ps(line[i], low, line[i + 8]);
      next[2 * i + 1] = _mm512_permutex2var_ps(line[i], high, line[i + 8]);
    });
    each<16>([&](auto i) __attribute__((always_inline)) { line[i] = next[i]; });
  });
}

// 16 lines of 16 bytes → the 16 columns.
INLINE void turn(__m128i (&line)[LANES]) {
  // one step pairs line i with line i + 8, and halves the distance of neighbors: four of them turn the square
  each<4>([&](auto) __attribute__((always_inline)) {
    __m128i next[LANES];
    each<8>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = _mm_unpacklo_epi8(line[i], line[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(line[i], line[i + 8]);
    });
    each<16>([&](auto i) __attribute__((always_inline)) { line[i] = next[i]; });
  });
}

// 0, step, 2·step …
inline __m512i scale_lanes(int64_t step) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int32_t(step)));
}

inline __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

// Store the first floats of a line.
INLINE void store_lanes(float *to, __mmask16 mask, __m512 values) {
  if (mask == 0xffff)
    _mm512_storeu_ps(to, values);
  else
    _mm512_mask_storeu_ps(to, mask, values);
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
      const __mmask64 mask = length - c >= 64 ? ~0ull : (1ull << (length - c)) - 1;
      if (length - c >= 64)  // masks take the processor several times as long
        _mm512_storeu_si512(copy, _mm512_xor_si512(_mm512_loadu_si512(bytes), flip));
      else
        _mm512_mask_storeu_epi8(copy, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, bytes), flip));
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
      turn(line);
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
