#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90("deep304")
MARLIN_QQQ_INSTANTIATE_SM90("deep320")
