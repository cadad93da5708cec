// The level for every 64-bit ARM CPU. The product is fp32 whatever precision is asked for.
#include "level.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL neon
#define MONOSEM_LEVEL_NAME "neon"

namespace monosem::neon {
namespace {

constexpr bool kHasLow = false;

#include "neon.inl"
using Bf16Product = Fp32Product;
using Int8Product = Fp32Product;
#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::neon

const monosem::Level* monosem::level_neon() { return &neon::kLevel; }

#endif
