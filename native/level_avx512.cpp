// The level for AVX-512 with dot products of bf16 and int8 (Zen 4, Sapphire Rapids and later).
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
constexpr bool kHasLow = true;

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
struct Bf16Product {
  static constexpr uint32_t kFlip = 0;

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
    bound = {norm_above(sum(squares), d), norm_above(sum(errors), d), 1.0f, 0};
  }

  static inline void convert(Vec (&)[kTileRows][2], const PackedEncoder&, int64_t, const float*) {}

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

/// Words of four int8, summed into int32 by vpdpbusd. It multiplies unsigned by signed, so rows of x are shifted by 128.
/// Its bound is not one: operands are too coarse for Cauchy-Schwarz to be of use. Rounding errors are taken as independent,
/// and the interval as 8 of their standard deviations, |error| / sqrt(D) each.
struct Int8Product {
  static constexpr uint32_t kFlip = 0x80808080;

  static int64_t words(int64_t d) { return (d + 3) / 4; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    Vec largest{};
    each_vector(d, [&](int64_t t, auto at) {
      largest = (Vec)_mm512_max_ps((__m512)largest, _mm512_abs_ps((__m512)at.load(row + t)));
    });
    const float most = _mm512_reduce_max_ps((__m512)largest), scale = most / 127.0f;
    const Vec inverse = splat(scale > 0 ? 1.0f / scale : 0.0f), unit = splat(scale);
    Vec squares{}, errors{};
    __m512i total = _mm512_setzero_si512();
    int8_t* out = reinterpret_cast<int8_t*>(words);
    memset(words, 0, static_cast<size_t>(Int8Product::words(d)) * 4);
    each_vector(d, [&](int64_t t, auto at) {
      const Vec exact = at.load(row + t);
      const __m512i whole = _mm512_cvtps_epi32((__m512)(exact * inverse));
      const __m128i bytes = _mm512_cvtsepi32_epi8(whole);
      const Vec error = exact - unit * (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
      squares = fma(exact, exact, squares);
      errors = fma(error, error, errors);
      total = _mm512_add_epi32(total, _mm512_cvtepi8_epi32(bytes));
      memcpy(out + t, &bytes, static_cast<size_t>(d - t < kLanes ? d - t : kLanes));
    });
    const float error = norm_above(sum(errors), d), deviations = 8.0f / __builtin_sqrtf(static_cast<float>(d));
    bound = {norm_above(sum(squares), d) + error, deviations < 1 ? deviations * error : error, scale,
             _mm512_reduce_add_epi32(total)};
  }

  static inline __attribute__((always_inline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                              Vec (&acc)[kTileRows][2]) {
    __m512i sums[kTileRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; ++s, tile += kTileRows, panel += kPanel) {
      const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(tile[r]));
        // Written out because the compiler spills the accumulators of the intrinsic.
        asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][0]) : "v"(x), "v"(w0));
        asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][1]) : "v"(x), "v"(w1));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      acc[r][0] = (Vec)sums[r][0];
      acc[r][1] = (Vec)sums[r][1];
    }
  }

  static inline __attribute__((always_inline)) void convert(Vec (&acc)[kTileRows][2], const PackedEncoder& packed,
                                                             int64_t first, const float* row_scale) {
    for (int v = 0; v < 2; ++v) {
      const __m512i offset = _mm512_loadu_si512(packed.offset + first + v * kLanes);
      const Vec scale = load(packed.scale + first + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const __m512i whole = _mm512_sub_epi32((__m512i)acc[r][v], offset);
        acc[r][v] = (Vec)_mm512_cvtepi32_ps(whole) * (scale * splat(row_scale[r]));
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
