// The rules of scales: those of runtime/scales.py, bit for bit.

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

}  // namespace
