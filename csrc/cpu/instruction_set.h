// Runs a kernel in the widest instruction set that the processor has, chosen at run time, so that
// one build serves every processor of an architecture.

#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#include <xmmintrin.h>
#define MEDFAST_X86 1
#define MEDFAST_AVX2 __attribute__((target("avx2,fma")))
#define MEDFAST_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#endif
// By compilers that know AMX, where Linux grants its registers.
#if MEDFAST_X86 && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MEDFAST_HAS_AMX 1
#define MEDFAST_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

// A kernel body takes the instruction set of the function it is inlined into. It must not hold an
// OpenMP parallel region: compilers move those out, back to the baseline.
#if defined(__GNUC__)
#define MEDFAST_KERNEL __attribute__((always_inline)) inline
#else
#define MEDFAST_KERNEL inline
#endif

namespace medfast {

// Each has those before it; amx differs from avx512 in products of bf16 alone. AVX-512's own bf16
// products are no faster than fp32's on Intel's processors, and not used.
enum class InstructionSet { baseline, avx2, avx512, amx };

#if MEDFAST_HAS_AMX
// Asks the system for the tile registers, too: a process has them only then.
inline bool has_amx() {
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0 &&
         (d >> 24 & 1) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{"baseline"};
#if MEDFAST_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return names;
  names.push_back("avx2");
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
    return names;
  names.push_back("avx512");
#if MEDFAST_HAS_AMX
  if (has_amx()) names.push_back("amx");
#endif
#endif
  return names;
}

inline InstructionSet chosen = static_cast<InstructionSet>(instruction_sets().size() - 1);

inline void use_instruction_set(const std::string& name) {
  const auto names = instruction_sets();
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) {
      chosen = static_cast<InstructionSet>(i);
      return;
    }
  throw std::invalid_argument("this processor does not have the instruction set " + name);
}

#if MEDFAST_X86
// While it lives, this thread's results below 2^-126 are 0. As denormals they would cost a hundred
// times a multiplication each, and an exponential is soon that small.
class FlushToZero {
 public:
  FlushToZero() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

template <auto kernel, class... Args>
MEDFAST_AVX2 void run_avx2(Args... args) {
  kernel(args...);
}

template <auto kernel, class... Args>
MEDFAST_AVX512 void run_avx512(Args... args) {
  kernel(args...);
}
#endif

// Calls `kernel` compiled for the chosen instruction set.
template <auto kernel, class... Args>
void run(Args... args) {
#if MEDFAST_X86
  const FlushToZero while_it_runs;
  if (chosen >= InstructionSet::avx512) return run_avx512<kernel>(args...);
  if (chosen == InstructionSet::avx2) return run_avx2<kernel>(args...);
#endif
  kernel(args...);
}

}  // namespace medfast
