// Images of codes, and the positions that a convolution reads. For each dimension of space: at position t, tap u the
// index start + step·t + dilation·u. Space has 3 dimensions; the first ones have one element where it has fewer.

#ifdef HAS_VECTORS
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

// Floats that are `step` apart in memory, and the way back.
INLINE Floats load_lanes(const float *from, int64_t step, Mask mask) {
  return step == 1 ? load_floats(mask, from) : gather(mask, from, step);
}

// A place in a tensor of float32, or of bfloat16, which is written but not read.
struct Output {
  uint8_t *data;
  int64_t size;  // bytes of an element
  INLINE Output operator+(int64_t elements) const { return {data + elements * size, size}; }
  INLINE float *as_floats() const { return reinterpret_cast<float *>(data); }
};

INLINE void store_lanes(float *to, int64_t step, Mask mask, Floats values) {
  step == 1 ? store_floats(mask, to, values) : scatter(mask, to, step, values);
}

INLINE void store_lanes(const Output &to, int64_t step, Mask mask, Floats values) {
  if (to.size == sizeof(float)) return store_lanes(to.as_floats(), step, mask, values);
  const Shorts shorts = to_shorts(values);
  if (is_full(mask) && step == 1) return store(to.data, shorts);
  for (int64_t i = 0; i < LANES; ++i)
    if (has_lane(mask, i)) store((to + i * step).data, uint16_t(shorts[i]));
}

// Bytes from what is copied to what is fetched. Without it weight gradients of 16 channels take 1.2 ms in place of 0.96.
constexpr int64_t AHEAD = 8192;

// Copy neighbors of a row whose channels lie side by side. The last 16 bytes start early: masks take long.
template <typename Byte, typename To>
void copy_lines(const Image &x, const int8_t *from, int64_t count, int64_t pitch, To *to) {
  const __m128i flip = _mm_set1_epi8(char(x.flip));
  const bool is_dense = x.stride[4] == x.channels && pitch == x.channels;
  const int64_t lines = is_dense ? 1 : count, length = is_dense ? count * x.channels : x.channels;
  for (int64_t i = 0; i < lines; ++i, from += x.stride[4], to += pitch) {
    int64_t c = 0;
    for (; c + 64 <= length; c += 64) {
      fetch(from + c, AHEAD);
      each<4>([&](auto k) __attribute__((always_inline)) {
        write_bytes<Byte>(_mm_xor_si128(load<__m128i>(from + c + 16 * k), flip), 16, to + c + 16 * k);
      });
    }
    for (; c < length; c += 16) {
      const int64_t at = std::min(c, std::max<int64_t>(length - 16, 0));
      write_bytes<Byte>(_mm_xor_si128(read_bytes(from + at, length), flip), length, to + at);
    }
  }
}

// Copy neighbors of a row that lie side by side, channel by channel: squares of 16 × 16 are turned.
template <typename Byte, typename To>
void turn_lines(const Image &x, const int8_t *from, int64_t count, int64_t pitch, To *to) {
  const __m128i flip = _mm_set1_epi8(char(x.flip));
  for (int64_t c = 0; c < x.channels; c += 16)
    for (int64_t i = 0; i < count; i += 16) {
      __m128i line[16];
      for (int64_t k = 0; k < 16; ++k)
        line[k] = c + k < x.channels ? read_bytes(from + (c + k) * x.stride[1] + i, count - i) : _mm_setzero_si128();
      turn_bytes(line);
      for (int64_t k = 0; k < std::min<int64_t>(16, count - i); ++k)
        write_bytes<Byte>(_mm_xor_si128(line[k], flip), x.channels - c, to + (i + k) * pitch + c);
    }
}

// Copy the row [first, first + length) of a sample as [length, pitch], and the code `zero` outside of the image. After
// the flip codes are signed or not, as `Byte` is.
template <typename Byte, typename To>
void copy_row(const Image &x, int32_t zero, int64_t sample, int64_t depth, int64_t row, int64_t first, int64_t length,
              int64_t pitch, To *to) {
  if (depth < 0 || depth >= x.space[0] || row < 0 || row >= x.space[1]) {
    std::fill_n(to, length * pitch, To(zero));
    return;
  }
  const int64_t low = std::clamp<int64_t>(-first, 0, length), high = std::clamp<int64_t>(x.space[2] - first, low, length);
  std::fill_n(to, low * pitch, To(zero));
  std::fill_n(to + high * pitch, (length - high) * pitch, To(zero));
  const int8_t *from = x.codes + sample * x.stride[0] + depth * x.stride[2] + row * x.stride[3];
  from += (first + low) * x.stride[4];
  (x.stride[1] == 1 ? copy_lines<Byte, To> : turn_lines<Byte, To>)(x, from, high - low, pitch, to + low * pitch);
}

}  // namespace
#endif
