// The rules of scales and codes: those of runtime/scales.py and runtime/references.py, bit for bit.

namespace {

constexpr uint32_t INFINITE = 0x7F800000;
constexpr int32_t NAN_EXPONENT = 255, NOT_A_NUMBER = 0x7FC00000;

// Int: int32_t, or a vector of them. The bits of a magnitude give the exponent of its block.
template <typename Int>
inline Int find_exponent(const Task& task, Int bits) {
    const Int zero{}, one = zero + 1;
    const Int field = bits >> 23, mantissa = bits & 0x7FFFFF;
    const Int up = mantissa > task.up ? one : zero, down = mantissa <= task.down ? one : zero;
    Int code = field + (1 - task.magnitude_bits) + up - down;
    code = code < task.low ? zero + task.low : code;
    code = code > task.high ? zero + task.high : code;
    return field == 255 ? zero + NAN_EXPONENT : code;
}

inline float find_real_scale(const Task& task, uint32_t bits) {
    const float scale = as_float(bits) / task.reach;
    return bits >= INFINITE ? as_float(NOT_A_NUMBER) : scale < 0x1p-126f ? 0x1p-126f : scale;
}

// The bits of 2^(exponent - 127), and of its inverse, of which 2^-127 is subnormal.
template <typename Int>
inline Int get_factor(Int exponent) {
    const Int zero{};
    return exponent == NAN_EXPONENT ? zero + NOT_A_NUMBER : exponent << 23;
}

template <typename Int>
inline Int get_inverse(Int exponent) {
    const Int zero{}, normal = (254 - exponent) << 23;
    return exponent == NAN_EXPONENT ? zero + NOT_A_NUMBER : exponent == 254 ? zero + 0x00400000 : normal;
}

// The code of a real number: to nearest, or stochastically by a counter; of NaN, the code of zero.
//
// A sum with FIRST_INTEGER, between 2^23 and 2^24, is a whole number, rounded to nearest even: 2.5 + 12582912 = 12582914.
// Its bits count up from those of FIRST_INTEGER. Bounds are whole numbers, so they may come first.
template <bool STOCHASTIC>
inline int32_t round_code(float real, uint32_t counter, float zero, float lowest, float largest) {
    constexpr float FIRST_INTEGER = 0x1.8p23f;
    const float low = lowest - zero, high = largest - zero;
    float inside = real == real ? real : 0.0f;
    inside = inside > low ? inside : low;
    inside = inside < high ? inside : high;
    const float floor = STOCHASTIC ? std::floor(inside) : inside;
    const int32_t code = static_cast<int32_t>(as_bits(floor + FIRST_INTEGER + zero) - as_bits(FIRST_INTEGER));
    if constexpr (!STOCHASTIC) return code;
    const float number = static_cast<float>(static_cast<int32_t>(mix_bits(counter) >> 8));
    return code + (number < (inside - floor) * 0x1p24f);
}

// The float of a code; NaN if the magnitude of x is at the limit. By bits: no choice of floats is vectorized here.
inline float show_code(int32_t code, float zero, float factor, float x, uint32_t limit) {
    const uint32_t keeps = magnitude(x) >= limit ? 0 : ~0u;
    return as_float((as_bits((static_cast<float>(code) - zero) * factor) & keeps) | (NOT_A_NUMBER & ~keeps));
}

}  // namespace
