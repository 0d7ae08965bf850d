#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90_QUANTIZING("warp8")
