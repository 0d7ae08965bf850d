#include "cuda/sm80/instantiate.cuh"

MARLIN_QQQ_INSTANTIATE_SM80("mma64lean")
MARLIN_QQQ_INSTANTIATE_SM80("mma64")
