// Issue peak of this CPU: multiply-adds a second that independent instructions reach on operands in registers.
//
//   peak THREADS    a worker (see workers.py): for each line on stdin, one line of JSON on stdout with operations a
//                   second of all threads together, for the widest instruction of each kind that the CPU has
//
// A multiply-add is two operations. fp32: vfmadd231ps; bf16: tdpbf16ps or vdpbf16ps; int8: tdpbssd or vpdpbusd.
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kInstructions = 20;  // a turn of the loop; ten or more independent ones cover latency times issue width
constexpr double kSeconds = 0.05;

#if defined(__x86_64__)
#define TEN(f, op) f(op, 0) f(op, 1) f(op, 2) f(op, 3) f(op, 4) f(op, 5) f(op, 6) f(op, 7) f(op, 8) f(op, 9)
#define TEN_MORE(f, op) \
  f(op, 10) f(op, 11) f(op, 12) f(op, 13) f(op, 14) f(op, 15) f(op, 16) f(op, 17) f(op, 18) f(op, 19)
#define ZMM(op, i) op " %%zmm30, %%zmm31, %%zmm" #i "\n"
#define YMM(op, i) op " %%ymm14, %%ymm15, %%ymm" #i "\n"
#define CLEAR_ZMM(op, i) op " %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define CLEAR_YMM(op, i) op " %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"

// The registers are cleared first: what lies in them may be denormal, and slow. The compiler itself uses 0 to 15 only.
#define LOOP(name, clear, turn)                                                                                    \
  void name(long turns) {                                                                                          \
    asm volatile(clear "1:\n" turn "dec %0\n jnz 1b\n"                                                            \
                 : "+r"(turns)                                                                                     \
                 :                                                                                                 \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                   "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                                   \
  }
#define CLEAR_ALL_ZMM                                                                                       \
  TEN(CLEAR_ZMM, "vpxorq") TEN_MORE(CLEAR_ZMM, "vpxorq") CLEAR_ZMM("vpxorq", 30) CLEAR_ZMM("vpxorq", 31)
#define CLEAR_ALL_YMM TEN(CLEAR_YMM, "vpxor") CLEAR_YMM("vpxor", 14) CLEAR_YMM("vpxor", 15)

LOOP(fp32_avx512, CLEAR_ALL_ZMM, TEN(ZMM, "vfmadd231ps") TEN_MORE(ZMM, "vfmadd231ps"))
LOOP(bf16_avx512, CLEAR_ALL_ZMM, TEN(ZMM, "vdpbf16ps") TEN_MORE(ZMM, "vdpbf16ps"))
LOOP(int8_avx512, CLEAR_ALL_ZMM, TEN(ZMM, "vpdpbusd") TEN_MORE(ZMM, "vpdpbusd"))
LOOP(fp32_avx2, CLEAR_ALL_YMM, TEN(YMM, "vfmadd231ps") TEN(YMM, "vfmadd231ps"))
#endif

#if defined(__x86_64__) && defined(__linux__)
// Matrix tiles of 16 rows x 64 bytes: 0 to 3 accumulate, 4 and 5 are multiplied.
#define TILES(op) op " %%tmm5, %%tmm4, %%tmm0\n" op " %%tmm5, %%tmm4, %%tmm1\n" op " %%tmm5, %%tmm4, %%tmm2\n" op " %%tmm5, %%tmm4, %%tmm3\n"
#define AMX_LOOP(name, op)                                                                                           \
  void name(long turns) {                                                                                            \
    alignas(64) struct {                                                                                             \
      unsigned char palette = 1, start_row = 0, reserved[14] = {};                                                   \
      unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};                                               \
      unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};                                                     \
    } config;                                                                                                        \
    asm volatile("ldtilecfg %1\n"                                                                                   \
                 "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n tilezero %%tmm4\n tilezero %%tmm5\n"   \
                 "1:\n" TILES(op) TILES(op) TILES(op) TILES(op) TILES(op) "dec %0\n jnz 1b\n tilerelease\n"          \
                 : "+r"(turns)                                                                                       \
                 : "m"(config)                                                                                       \
                 : "cc");                                                                                            \
  }
AMX_LOOP(bf16_amx, "tdpbf16ps")
AMX_LOOP(int8_amx, "tdpbssd")

/// Whether there are matrix tiles, and the kernel lets this process use them.
bool amx_is_allowed() {
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // amx-bf16, amx-tile, amx-int8
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#else
bool amx_is_allowed() { return false; }
void bf16_amx(long) {}
void int8_amx(long) {}
#endif

struct Kind {
  const char* name;
  void (*loop)(long turns);
  double operations;  // of one instruction
};

std::vector<Kind> kinds() {
  std::vector<Kind> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) {
    found.push_back({"fp32", fp32_avx512, 2 * 16});
    if (amx_is_allowed()) {
      found.push_back({"bf16", bf16_amx, 2 * 16 * 16 * 32});
      found.push_back({"int8", int8_amx, 2 * 16 * 16 * 64});
      return found;
    }
    if (__builtin_cpu_supports("avx512bf16")) found.push_back({"bf16", bf16_avx512, 2 * 32});
    if (__builtin_cpu_supports("avx512vnni")) found.push_back({"int8", int8_avx512, 2 * 64});
  } else if (__builtin_cpu_supports("fma")) {
    found.push_back({"fp32", fp32_avx2, 2 * 8});
  }
#endif
  return found;
}

/// Time that this thread has run: what other processes take away does not lower the peak.
double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Operations a second of one thread.
double measure(const Kind& kind) {
  const double start = thread_seconds();
  double elapsed = 0, turns = 0;
  while (elapsed < kSeconds) {
    kind.loop(10000);
    turns += 10000;
    elapsed = thread_seconds() - start;
  }
  return turns * kInstructions * kind.operations / elapsed;
}

double measure(const Kind& kind, int n_threads) {
  std::vector<double> rates(static_cast<size_t>(n_threads));
  std::vector<std::thread> threads;
  for (double& rate : rates) threads.emplace_back([&] { rate = measure(kind); });
  double sum = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].join();
    sum += rates[i];
  }
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  const int n_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::puts("{\"ready\": true}");
  std::fflush(stdout);
  for (int c; (c = std::getchar()) != EOF;) {
    if (c != '\n') continue;
    std::string line;
    for (const Kind& kind : kinds()) {
      char item[64];
      std::snprintf(item, sizeof item, "%s\"%s\": %.6g", line.empty() ? "" : ", ", kind.name, measure(kind, n_threads));
      line += item;
    }
    std::printf("{%s}\n", line.c_str());
    std::fflush(stdout);
  }
}
