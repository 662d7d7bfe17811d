// Vectors of eight lanes: what the lanes of blocks of eight have in common. Loops over arrays of eight are not vectorized.

namespace {

using Eight = uint32_t __attribute__((vector_size(32)));
using EightSigned = int32_t __attribute__((vector_size(32)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Eight{__VA_ARGS__})
#endif

inline Eight choose_larger(Eight a, Eight b) { return a > b ? a : b; }

inline Eight load_magnitudes(const float* from) {
    Eight bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits & 0x7FFFFFFFu;
}

template <typename Vector>
inline void store_eight(Vector value, void* to) {
    std::memcpy(to, &value, sizeof value);
}

// The larger of two neighbors, in each half: two of a, then two of b.
inline Eight join_neighbors(Eight a, Eight b) {
    return choose_larger(SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14), SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15));
}

// The largest of the lanes of each of eight vectors.
inline Eight join_eights(const Eight* all) {
    const Eight first = join_neighbors(join_neighbors(all[0], all[1]), join_neighbors(all[2], all[3]));
    const Eight last = join_neighbors(join_neighbors(all[4], all[5]), join_neighbors(all[6], all[7]));
    return choose_larger(SHUFFLE(first, last, 0, 1, 2, 3, 8, 9, 10, 11), SHUFFLE(first, last, 4, 5, 6, 7, 12, 13, 14, 15));
}

// Each lane eight times.
inline void spread_eights(EightSigned value, float* lanes) {
    store_eight(SHUFFLE(value, value, 0, 0, 0, 0, 0, 0, 0, 0), lanes);
    store_eight(SHUFFLE(value, value, 1, 1, 1, 1, 1, 1, 1, 1), lanes + 8);
    store_eight(SHUFFLE(value, value, 2, 2, 2, 2, 2, 2, 2, 2), lanes + 16);
    store_eight(SHUFFLE(value, value, 3, 3, 3, 3, 3, 3, 3, 3), lanes + 24);
    store_eight(SHUFFLE(value, value, 4, 4, 4, 4, 4, 4, 4, 4), lanes + 32);
    store_eight(SHUFFLE(value, value, 5, 5, 5, 5, 5, 5, 5, 5), lanes + 40);
    store_eight(SHUFFLE(value, value, 6, 6, 6, 6, 6, 6, 6, 6), lanes + 48);
    store_eight(SHUFFLE(value, value, 7, 7, 7, 7, 7, 7, 7, 7), lanes + 56);
}

}  // namespace
