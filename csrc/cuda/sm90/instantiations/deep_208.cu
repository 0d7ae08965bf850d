#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90("deep208")
MARLIN_QQQ_INSTANTIATE_SM90("deep224")
