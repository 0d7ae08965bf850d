#include "cuda/sm90/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM90("wide144")
MARLIN_QQQ_INSTANTIATE_SM90("wide160")
