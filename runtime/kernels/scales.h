// The rules of scales and codes: those of runtime/scales.py and runtime/references.py, bit for bit.

namespace {

constexpr uint32_t NAN_EXPONENT = 255, INFINITE = 0x7F800000, NOT_A_NUMBER = 0x7FC00000;

inline uint32_t find_exponent(const Task& task, uint32_t bits) {
    const int32_t field = bits >> 23, mantissa = bits & 0x7FFFFF;
    const int32_t code = field + 1 - task.magnitude_bits + (mantissa > task.up) - (mantissa <= task.down);
    const int32_t clamped = code < task.low ? task.low : code > task.high ? task.high : code;
    return field == 255 ? NAN_EXPONENT : clamped;
}

inline float find_real_scale(const Task& task, uint32_t bits) {
    const float scale = as_float(bits) / task.reach;
    return bits >= INFINITE ? as_float(NOT_A_NUMBER) : scale < 0x1p-126f ? 0x1p-126f : scale;
}

inline float get_factor(uint32_t exponent) {
    return as_float(exponent == NAN_EXPONENT ? NOT_A_NUMBER : exponent << 23);
}

inline float get_inverse(uint32_t exponent) {  // 2^(127 - exponent), of which 2^-127 is subnormal
    return as_float(exponent == NAN_EXPONENT ? NOT_A_NUMBER : exponent == 254 ? 0x00400000u : (254 - exponent) << 23);
}

// The code of a real number: to nearest, or stochastically by a counter.
template <bool STOCHASTIC>
inline int32_t round_code(float real, uint32_t counter, float zero, float lowest, float largest) {
    float rounded;
    if constexpr (STOCHASTIC) {
        const float floor = std::floor(real);
        const float threshold = (real - floor) * 0x1p24f;
        const float number = static_cast<float>(static_cast<int32_t>(mix_bits(counter) >> 8));
        rounded = floor + (number < threshold ? 1.0f : 0.0f);
    } else {
        rounded = std::rint(real);
    }
    rounded = (rounded == rounded ? rounded : 0.0f) + zero;
    rounded = rounded > lowest ? rounded : lowest;
    rounded = rounded < largest ? rounded : largest;
    return static_cast<int32_t>(rounded);
}

// The float of a code; NaN if the magnitude of x is at the limit. By bits: no choice of floats is vectorized here.
inline float show_code(int32_t code, float zero, float factor, float x, uint32_t limit) {
    const uint32_t keeps = magnitude(x) >= limit ? 0 : ~0u;
    return as_float((as_bits((static_cast<float>(code) - zero) * factor) & keeps) | (NOT_A_NUMBER & ~keeps));
}

}  // namespace
