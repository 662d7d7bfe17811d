// Several codes in a byte: those of runtime/numbers/packing.py. Memory is [outer, parts · extent, inner]; a byte holds
// one code of each part.

namespace {

struct Parts {
    int64_t outer, extent, inner;  // of the packed tensor
    int64_t parts;                 // codes in a byte: 2 or 4
};

template <int64_t PARTS>
void pack(const Parts& given, const uint8_t* __restrict codes, uint8_t* __restrict packed) {
    constexpr int64_t width = 8 / PARTS;
    const int64_t run = given.extent * given.inner;
    for (int64_t outer = 0; outer < given.outer; ++outer, codes += PARTS * run, packed += run)
        for (int64_t i = 0; i < run; ++i) {
            uint8_t byte = 0;
            for (int64_t part = 0; part < PARTS; ++part)
                byte |= (codes[part * run + i] & ((1 << width) - 1)) << (part * width);
            packed[i] = byte;
        }
}

template <int64_t PARTS, bool SIGNED>
void unpack(const Parts& given, const uint8_t* __restrict packed, uint8_t* __restrict codes) {
    constexpr int64_t width = 8 / PARTS;
    constexpr uint8_t sign = SIGNED ? 1 << (width - 1) : 0;
    const int64_t run = given.extent * given.inner;
    for (int64_t outer = 0; outer < given.outer; ++outer, packed += run)
        for (int64_t part = 0; part < PARTS; ++part, codes += run)
            for (int64_t i = 0; i < run; ++i) {
                const uint8_t code = (packed[i] >> (part * width)) & ((1 << width) - 1);
                codes[i] = (code ^ sign) - sign;
            }
}

}  // namespace

extern "C" void pack_codes(const Parts* given, const uint8_t* codes, uint8_t* packed) {
    (given->parts == 2 ? pack<2> : pack<4>)(*given, codes, packed);
}

extern "C" void unpack_codes(const Parts* given, bool is_signed, const uint8_t* packed, uint8_t* codes) {
    if (given->parts == 2)
        (is_signed ? unpack<2, true> : unpack<2, false>)(*given, packed, codes);
    else
        (is_signed ? unpack<4, true> : unpack<4, false>)(*given, packed, codes);
}
