// Which level runs: the best that both this build and this CPU have, unless one is forced.
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "step.h"

namespace monosem {
namespace {

constexpr int kLevels = 5;

#if defined(__x86_64__)

/// Whether this CPU has matrix tiles and the kernel lets this process use them (Linux: once asked, for all its threads).
bool amx_is_allowed() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

/// Whether this CPU has dot products of int8 in vectors of AVX2. (Not every compiler's __builtin_cpu_supports knows.)
bool avx_vnni_is_there() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
#else
  return false;
#endif
}

#elif defined(__aarch64__)

/// What the system says of this CPU.
struct ArmFeatures {
  bool has_dot_products = false;  // of int8
  bool has_matrices = false;      // products of 2 x 2 pieces, in bf16 and int8

  ArmFeatures() {
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20, kMatrices = 1ul << 13 | 1ul << 14;  // asimddp; i8mm and bf16
    has_dot_products = getauxval(AT_HWCAP) & kDotProducts;
    has_matrices = has_dot_products && (getauxval(AT_HWCAP2) & kMatrices) == kMatrices;
#elif defined(__APPLE__)
    const auto is_set = [](const char* name) {
      int value = 0;
      size_t size = sizeof value;
      return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    has_dot_products = is_set("hw.optional.arm.FEAT_DotProd");
    has_matrices = has_dot_products && is_set("hw.optional.arm.FEAT_BF16") && is_set("hw.optional.arm.FEAT_I8MM");
#endif
  }
};

#endif

struct Available {
  const Level* levels[kLevels] = {};
  const char* names[kLevels + 1] = {};
  int count = 0;

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
      if (level_amx() && amx_is_allowed()) add(level_amx());
      add(level_avx512());
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      if (avx_vnni_is_there()) add(level_avxvnni());
      add(level_avx2());
    }
#elif defined(__aarch64__)
    const ArmFeatures arm;
    if (arm.has_matrices) add(level_neon_mmla());
    if (arm.has_dot_products) add(level_neon_dot());
    add(level_neon());
#endif
    add(level_portable());
  }

  void add(const Level* level) {
    if (!level) return;
    names[count] = level->name;
    levels[count++] = level;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

const Level* forced = nullptr;

}  // namespace

const Level& level() { return forced ? *forced : *available().levels[0]; }

bool set_level(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    forced = nullptr;
    return true;
  }
  for (int i = 0; i < available().count; ++i)
    if (std::strcmp(available().names[i], name) == 0) {
      forced = available().levels[i];
      return true;
    }
  return false;
}

const char* const* level_names() { return available().names; }

}  // namespace monosem
