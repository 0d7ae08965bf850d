#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("narrow48", true, kAhead)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("narrow64", true, kAhead)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("narrow80", true, kAhead)
