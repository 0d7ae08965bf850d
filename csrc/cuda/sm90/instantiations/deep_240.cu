#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90("deep240")
MARLIN_QQQ_INSTANTIATE_SM90("deep256")
