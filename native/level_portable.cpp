// The level for every CPU: vectors of four floats, which the compiler maps to SSE2 or plain code.
#include "level.h"

#include <string.h>
#include <time.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define MONOSEM_LEVEL portable
#define MONOSEM_LEVEL_NAME "portable"

namespace monosem::portable {
namespace {

constexpr int kLanes = 4;
constexpr int kTileRows = 6;       // 12 accumulators fit 16 registers
constexpr int kGradientBlock = 6;
constexpr bool kHasLow = false;

#include "vector.inl"

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline Vec root(Vec a) {
#if defined(__SSE2__)
  return (Vec)_mm_sqrt_ps((__m128)a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

inline uint32_t at_least(Vec a, Vec b) {
#if defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b)));
#else
  const auto passed = a >= b;
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i)
    if (passed[i]) mask |= 1u << i;
  return mask;
#endif
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
}  // namespace monosem::portable

const monosem::Level* monosem::level_portable() { return &portable::kLevel; }
