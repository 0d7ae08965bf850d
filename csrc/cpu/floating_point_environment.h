// Results must not depend on what the calling thread did to its floating-point unit: torch.set_flush_denormal changes
// one thread only, and the pool's workers would then round differently from their caller.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace marlin_qqq::cpu {

// Round to nearest even, subnormals kept, exceptions masked; puts the caller's settings back at the end of its scope.
class DefaultFloatingPointEnvironment {
 public:
  DefaultFloatingPointEnvironment(const DefaultFloatingPointEnvironment&) = delete;
  DefaultFloatingPointEnvironment& operator=(const DefaultFloatingPointEnvironment&) = delete;

#if defined(__x86_64__) || defined(__i386__)
  DefaultFloatingPointEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatingPointEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned int saved_;
#elif defined(__aarch64__)
  DefaultFloatingPointEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
  }
  ~DefaultFloatingPointEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  uint64_t saved_ = 0;
#else
  DefaultFloatingPointEnvironment() = default;
#endif
};

}  // namespace marlin_qqq::cpu
