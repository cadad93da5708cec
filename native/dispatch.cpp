// Which level runs: the best that both this build and this CPU have, unless one is forced.
#include <cstring>

#include "step.h"

namespace monosem {
namespace {

constexpr int kLevels = 3;

struct Available {
  const Level* levels[kLevels] = {};
  const char* names[kLevels + 1] = {};
  int count = 0;

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
      add(level_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(level_avx2());
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
