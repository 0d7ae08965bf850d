#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90("deep272")
MARLIN_QQQ_INSTANTIATE_SM90("deep288")
