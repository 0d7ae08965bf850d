// The planner's model of time, shared by the architectures. It ranks candidates; it does not predict a measurement.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "format/divide_up.h"
#include "plan/plan.h"

namespace marlin_qqq::plan {

// Cycles of one block for 128 inputs of its tile, by the unit that spends them; the units overlap.
struct SliceCycles {
  double tensor;   // matrix products
  double dequant;  // instructions that make int8 operands
  double feed;     // bytes into shared memory
};

// Times that overlap: the largest dominates, and the others show when they come close.
// Scaled by the larger one, so that no power overflows.
inline double norm(double a, double b, double order) {
  const double larger = std::max(a, b);
  if (larger <= 0) return 0;
  return larger * std::pow(1 + std::pow(std::min(a, b) / larger, order), 1 / order);
}

inline double overlapped(const SliceCycles& c, double order) {
  return norm(norm(c.tensor, c.dequant, order), c.feed, order);
}

// Bytes that have to cross the memory bus at least once.
inline double problem_bytes(const Problem& p) {
  const double n = static_cast<double>(p.out_features);
  const double k = static_cast<double>(p.in_features);
  const double m = static_cast<double>(p.num_tokens);
  return n * k / 2 + (p.group_size > 0 ? n * k / 64 : 0.0) + m * k + 2 * m * n;
}

inline double memory_us(const Problem& p, const DeviceProperties& d) {
  // 94 % of the bus's rate is what a large read reaches (4.6 of 4.9 TB/s on an H200).
  return problem_bytes(p) / (0.94 * d.memory_gb_per_s * 1e3);
}

}  // namespace marlin_qqq::plan
