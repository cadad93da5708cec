// The level for AVX2 with FMA (Haswell, Zen and later). bf16 runs as fp32.
#include "level.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL avx2
#define MONOSEM_LEVEL_NAME "avx2"

namespace monosem::avx2 {
namespace {

#include "avx2.inl"

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/// vpmaddubsw, vpmaddwd. The first adds two products in 16 bits, so latents are rounded to -63 ... 63: 2 x 255 x 63 fits.
struct Unit {
  static inline __attribute__((always_inline)) void add(__m256i& sums, __m256i x, __m256i w) {
    __m256i pairs;
    // Written out because the compiler spills the accumulators of the intrinsics.
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sums), "=&x"(pairs)
        : "x"(x), "x"(w), "m"(kOnes));
  }
};

struct Int8Product : ShiftedInt8Product<Unit> {
  static void round_latent(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    round_within(63, row, d, words, bound);
  }
};

#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::avx2

const monosem::Level* monosem::level_avx2() { return &avx2::kLevel; }

#else

const monosem::Level* monosem::level_avx2() { return nullptr; }

#endif
