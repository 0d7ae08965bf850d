#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("warp8", true, kAhead)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("warp16", true, kAhead)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("warp24", true, kAhead)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("warp32", true, kAhead)
