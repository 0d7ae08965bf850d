// Walking round a ring of stages.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::cuda::sm90 {

// A place in a ring of kStages stages, of which the first `used` are, and the parity of its barriers' current phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  int used = kStages;

  MARLIN_QQQ_HOST_DEVICE void advance() {
    if (++stage == used) {
      stage = 0;
      phase ^= 1;
    }
  }

  // As often as that.
  MARLIN_QQQ_HOST_DEVICE void skip(int stages) {
    stage += stages;
    phase ^= static_cast<uint32_t>(stage / used % 2);
    stage %= used;
  }
};

}  // namespace marlin_qqq::cuda::sm90
