// Marks a function that the host and the GPU share.
#pragma once

#if defined(__CUDACC__)
#define MARLIN_QQQ_HOST_DEVICE __host__ __device__
#else
#define MARLIN_QQQ_HOST_DEVICE
#endif
