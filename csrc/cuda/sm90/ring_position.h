// Walking round a ring of stages.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::cuda::sm90 {

// A place in a ring of kStages stages, and the parity of its barriers' current phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  MARLIN_QQQ_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }

  // As often as that.
  MARLIN_QQQ_HOST_DEVICE void skip(int stages) {
    stage += stages;
    phase ^= static_cast<uint32_t>(stage / kStages % 2);
    stage %= kStages;
  }
};

}  // namespace marlin_qqq::cuda::sm90
