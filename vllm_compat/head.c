/* out[c, r] = sum over k of hidden[c, k] * weight[r, k]: bfloat16 in, products and sums in float32, float32 out.

   Built by head.py for the processor it runs on. An element's order of summation depends on the width alone, so a row's
   logits do not depend on what else is in the batch, nor on the number of threads. */

#include <stdint.h>
#include <string.h>

#define ROWS 4 /* 4 x 6 sums fill the registers of AVX-512 */
#define COLUMNS 6
#define BLOCK 128 /* rows of the weight that stay in the cache while the batch passes */
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(64)));

INLINE float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

#ifdef __AVX512BF16__ /* one instruction multiplies 32 pairs; subnormal numbers count as zero */
#include <immintrin.h>
#define STEP 32
const char *instructions(void) { return "AVX512-BF16"; }
typedef uint16_t activation; /* hidden states as they come */
typedef __m512i pairs;
INLINE pairs weight_at(const uint16_t *from) { return _mm512_loadu_si512(from); }
INLINE pairs hidden_at(const activation *from) { return _mm512_loadu_si512(from); }
INLINE vector add(vector sum, pairs a, pairs b) { return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE float value(activation of) { return widened(of); }
#else
#define STEP 16
const char *instructions(void) { return "float32"; }
typedef float activation; /* hidden states widened once by the caller */
typedef vector pairs;
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
INLINE pairs weight_at(const uint16_t *from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (pairs)(__builtin_convertvector(bits, words) << 16);
}
INLINE pairs hidden_at(const activation *from) {
    pairs found;
    memcpy(&found, from, sizeof found);
    return found;
}
INLINE vector add(vector sum, pairs a, pairs b) { return sum + a * b; }
INLINE float value(activation of) { return of; }
#endif

int hidden_bytes(void) { return sizeof(activation); }

INLINE void tile(const uint16_t *weight, const activation *hidden, float *out, int64_t width, int64_t vocab, const int rows,
                 const int columns) {
    vector sums[ROWS][COLUMNS] = {0};
    int64_t k = 0;
    for (; k + STEP <= width; k += STEP) {
        pairs from[ROWS];
        for (int r = 0; r < rows; r++) from[r] = weight_at(weight + r * width + k);
        for (int c = 0; c < columns; c++) {
            pairs with = hidden_at(hidden + c * width + k);
            for (int r = 0; r < rows; r++) sums[r][c] = add(sums[r][c], from[r], with);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            float sum = 0;
            for (int i = 0; i < 16; i++) sum += sums[r][c][i];
            for (int64_t rest = k; rest < width; rest++)
                sum += widened(weight[r * width + rest]) * value(hidden[c * width + rest]);
            out[c * vocab + r] = sum;
        }
}

static void strip(const uint16_t *weight, const activation *hidden, float *out, int64_t width, int64_t vocab, int rows,
                  int columns) {
#define CASE(count) \
    case count: tile(weight, hidden, out, width, vocab, ROWS, count); return;
    if (rows == ROWS) switch (columns) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            tile(weight + r * width, hidden + c * width, out + c * vocab + r, width, vocab, 1, 1);
}

/* weight [vocab, width] and hidden [batch, width] and out [batch, vocab], all contiguous */
void product(const uint16_t *weight, const activation *hidden, float *out, int64_t vocab, int64_t width, int64_t batch,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < vocab; first += BLOCK) {
        int64_t last = first + BLOCK < vocab ? first + BLOCK : vocab;
        for (int64_t c = 0; c < batch; c += COLUMNS)
            for (int64_t r = first; r < last; r += ROWS)
                strip(weight + r * width, hidden + c * width, out + c * vocab + r, width, vocab,
                      last - r < ROWS ? last - r : ROWS, batch - c < COLUMNS ? batch - c : COLUMNS);
    }
}
