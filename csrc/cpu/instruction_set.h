// Which instruction set the kernels use (declared in kernels.h): chosen once, at the first call.
#pragma once

#include "cpu/kernels.h"

#if defined(__x86_64__)
// A function compiled for more than the build's baseline. Callers check is_supported first.
#define MARLIN_QQQ_TARGET(features) __attribute__((target(features)))
#define MARLIN_QQQ_TARGET_AVX2 MARLIN_QQQ_TARGET("avx2,f16c")
#define MARLIN_QQQ_TARGET_AVX512_VNNI MARLIN_QQQ_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")
// avx_vnni came with GCC 11 and Clang 12.
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define MARLIN_QQQ_HAVE_AVX_VNNI 1
#define MARLIN_QQQ_TARGET_AVX_VNNI MARLIN_QQQ_TARGET("avx2,f16c,avxvnni")
#endif
#elif defined(__aarch64__)
#define MARLIN_QQQ_HAVE_NEON_DOTPROD 1
#if defined(__clang__)
#define MARLIN_QQQ_TARGET_NEON_DOTPROD __attribute__((target("dotprod")))
#else
#define MARLIN_QQQ_TARGET_NEON_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#endif
