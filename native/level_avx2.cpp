// The level for AVX2 with FMA (Haswell, Zen and later). The product is fp32 whatever precision is asked for.
#include "level.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL avx2
#define MONOSEM_LEVEL_NAME "avx2"

namespace monosem::avx2 {
namespace {

constexpr int kLanes = 8;
constexpr int kTileRows = 6;       // 12 accumulators, 2 of the panel, 1 broadcast: 15 of 16 registers
constexpr int kGradientBlock = 6;
constexpr bool kHasLow = false;

#include "vector.inl"

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline float sum(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Vec root(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
inline uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
}

inline int32_t append_lanes(float* upper, uint32_t* place, int32_t count, uint32_t mask, Vec values, uint32_t first) {
  return append_one_by_one(upper, place, count, mask, values, first);
}

#include "select.inl"
#include "linear.inl"
#include "product.inl"
using Bf16Product = Fp32Product;
using Int8Product = Fp32Product;
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
