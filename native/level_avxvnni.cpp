// The level for AVX2 with dot products of int8 (AVX-VNNI: Alder Lake, Zen 5 and later). bf16 runs as fp32.
#include "level.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)

#include <immintrin.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL avxvnni
#define MONOSEM_LEVEL_NAME "avxvnni"

namespace monosem::avxvnni {
namespace {

#include "avx2.inl"

struct Unit {
  static inline __attribute__((always_inline)) void add(__m256i& sums, __m256i x, __m256i w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));  // the compiler spills sums of the intrinsic
  }
};

using Int8Product = ShiftedInt8Product<Unit>;

#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::avxvnni

const monosem::Level* monosem::level_avxvnni() { return &avxvnni::kLevel; }

#else

const monosem::Level* monosem::level_avxvnni() { return nullptr; }

#endif
