// The level for AVX-512 with bf16 dot products (Zen 4, Sapphire Rapids and later).
#include "level.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)

#include <immintrin.h>
#include <string.h>

#define MONOSEM_LEVEL avx512
#define MONOSEM_LEVEL_NAME "avx512"

namespace monosem::avx512 {
namespace {

constexpr int kLanes = 16;
constexpr int kTileRows = 12;      // 24 accumulators, 2 of the panel, the rest for broadcasts: 32 registers
constexpr int kGradientBlock = 12; // vectors of encoder and decoder gradient held in registers at once
constexpr bool kHasBf16 = true;

#include "vector.inl"

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)a), _mm512_extractf32x8_ps((__m512)a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Vec root(Vec a) { return (Vec)_mm512_sqrt_ps((__m512)a); }
inline uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }

#include "select.inl"
#include "linear.inl"
#include "product.inl"

/// Words of two bf16, products of pairs summed into fp32 by vdpbf16ps.
struct LowProduct {
  static int64_t words(int64_t d) { return (d + 1) / 2; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    Vec squares{}, errors{};
    each_vector(d, [&](int64_t t, auto at) {
      const __m512 exact = (__m512)at.load(row + t);
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(exact);
      const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      const Vec error = (Vec)_mm512_sub_ps(exact, rounded);
      squares = fma((Vec)rounded, (Vec)rounded, squares);
      errors = fma(error, error, errors);
      if (t + kLanes <= d) _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + t / 2), half);
      else store_part(half, words + t / 2, d - t);
    });
    bound = {norm_above(sum(squares), d), norm_above(sum(errors), d), 1.0f};
  }

  static void store_part(__m256i half, uint32_t* words, int64_t n) {
    memset(words, 0, static_cast<size_t>((n + 1) / 2) * 4);
    memcpy(words, &half, static_cast<size_t>(n) * 2);
  }

  static inline __attribute__((always_inline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                              Vec (&acc)[kTileRows][2]) {
    for (int64_t s = 0; s < steps; ++s, tile += kTileRows, panel += kPanel) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(tile[r]));
        acc[r][0] = (Vec)_mm512_dpbf16_ps((__m512)acc[r][0], x, w0);
        acc[r][1] = (Vec)_mm512_dpbf16_ps((__m512)acc[r][1], x, w1);
      }
    }
  }
};

#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::avx512

const monosem::Level* monosem::level_avx512() { return &avx512::kLevel; }

#else

const monosem::Level* monosem::level_avx512() { return nullptr; }

#endif
