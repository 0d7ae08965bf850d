#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("warp8", false, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("warp8", true, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("flow8", false, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("flow8", true, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("quad8", false, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("quad8", true, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("stream8", false, kQuantizing)
MARLIN_QQQ_INSTANTIATE_SM90_VARIANT("stream8", true, kQuantizing)
