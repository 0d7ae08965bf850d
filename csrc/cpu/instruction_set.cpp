#include "cpu/instruction_set.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace marlin_qqq::cpu {
namespace {

constexpr InstructionSet kAll[] = {InstructionSet::kGeneric, InstructionSet::kAvx2, InstructionSet::kAvxVnni,
                                   InstructionSet::kAvx512Vnni, InstructionSet::kNeonDotprod};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0; }

bool has_avx_vnni() {
#if defined(MARLIN_QQQ_HAVE_AVX_VNNI)
  // CPUID leaf 7, subleaf 1, EAX bit 4; older compilers' __builtin_cpu_supports does not know the name.
  unsigned int eax = 0;
  unsigned int ebx = 0;
  unsigned int ecx = 0;
  unsigned int edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
#else
  return false;
#endif
}

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
         __builtin_cpu_supports("avx512vnni") != 0;
}
#endif

#if defined(__aarch64__)
bool has_neon_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP; older kernel headers lack the name
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return false;
#endif
}
#endif

// The best one, or what MARLIN_QQQ_CPU_LEVEL asks for if the machine has it.
InstructionSet choose() {
  InstructionSet best = InstructionSet::kGeneric;
  for (const InstructionSet set : kAll) {
    best = is_supported(set) ? set : best;
  }
  const char* wanted = std::getenv("MARLIN_QQQ_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (const InstructionSet set : kAll) {
    if (std::strcmp(wanted, instruction_set_name(set)) == 0 && is_supported(set)) {
      return set;
    }
  }
  std::fprintf(stderr, "marlin_qqq: MARLIN_QQQ_CPU_LEVEL is \"%s\", but this machine and build offer", wanted);
  for (const InstructionSet set : kAll) {
    if (is_supported(set)) {
      std::fprintf(stderr, " %s", instruction_set_name(set));
    }
  }
  std::fprintf(stderr, "; using %s\n", instruction_set_name(best));
  return best;
}

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> set{choose()};
  return set;
}

}  // namespace

const char* instruction_set_name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvxVnni:
      return "avx_vnni";
    case InstructionSet::kAvx512Vnni:
      return "avx512_vnni";
    case InstructionSet::kNeonDotprod:
      return "neon_dotprod";
    case InstructionSet::kGeneric:
      break;
  }
  return "generic";
}

bool is_supported(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx2:
      return has_avx2();
    case InstructionSet::kAvxVnni:
      return has_avx_vnni();
    case InstructionSet::kAvx512Vnni:
      return has_avx512_vnni();
#elif defined(__aarch64__)
    case InstructionSet::kNeonDotprod:
      return has_neon_dotprod();
#endif
    case InstructionSet::kGeneric:
      return true;
    default:
      return false;
  }
}

InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

bool set_instruction_set(InstructionSet set) {
  if (!is_supported(set)) {
    return false;
  }
  current().store(set, std::memory_order_relaxed);
  return true;
}

}  // namespace marlin_qqq::cpu
