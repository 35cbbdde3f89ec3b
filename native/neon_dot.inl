// NEON that multiplies four bytes at once. Included by isa_neon_dotprod.cpp and isa_neon_i8mm.cpp, which say with what
// instruction: DOT_BYTES, and DOT_BYTES_OF_LANE for one lane of x.

constexpr int MAX_WORD_BITS = 0;
constexpr bool DOTS_BYTES = true;
constexpr int MAX_QUERIES = 6;
#include "neon.inl"

// Four units of a row of x, and which of them is multiplied: a load for each would cost as much as the product.
struct Column {
    I units;
    int lane;
};
inline Column column_of(const int8_t* x, int column) { return {load_units(x + column / 16 * 16), column / 4 % 4}; }

inline I dot_bytes(I sum, I w, I x) { return DOT_BYTES(sum, w, x); }
inline I dot_bytes(I sum, I w, Column x) {
    switch (x.lane) {  // known when compiled
        case 0: return DOT_BYTES_OF_LANE(sum, w, x.units, 0);
        case 1: return DOT_BYTES_OF_LANE(sum, w, x.units, 1);
        case 2: return DOT_BYTES_OF_LANE(sum, w, x.units, 2);
        default: return DOT_BYTES_OF_LANE(sum, w, x.units, 3);
    }
}
