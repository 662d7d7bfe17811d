// Tensors of float32 or of bfloat16, which is the upper half of a float32. The loops of quantizers know float32 alone: a
// row of bfloat16 is copied, before it is read and after it is written.

namespace {

struct Reals {
    void* data;     // null: there is no tensor
    bool is_short;  // of bfloat16

    float* find_float(int64_t place) const { return static_cast<float*>(data) + place; }
    uint16_t* find_short(int64_t place) const { return static_cast<uint16_t*>(data) + place; }
    // The row at a place for a loop, which writes or reads `copy` if it is not that of the tensor.
    float* find_row(int64_t place, float* copy) const { return is_short ? copy : find_float(place); }
};

[[gnu::noinline]] void widen_row(const uint16_t* __restrict from, int64_t lanes, float* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) to[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
}

// To nearest even: half of the last place is added, less one unit of the float if the last bit is 0.
[[gnu::noinline]] void narrow_row(const float* __restrict from, int64_t lanes, uint16_t* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
        const uint32_t bits = as_bits(from[i]), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        to[i] = static_cast<uint16_t>(magnitude(from[i]) > INFINITE ? 0x7FC0 : rounded);
    }
}

const float* read_row(const Reals& tensor, int64_t place, int64_t lanes, float* copy) {
    if (tensor.is_short) widen_row(tensor.find_short(place), lanes, copy);
    return tensor.find_row(place, copy);
}

void write_copy(const Reals& tensor, int64_t place, int64_t lanes, const float* copy) {
    if (tensor.is_short) narrow_row(copy, lanes, tensor.find_short(place));
}

}  // namespace
