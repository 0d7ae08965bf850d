// A small persistent pool: starting threads costs more than a small product.
#pragma once

#include <cstdint>

namespace marlin_qqq::cpu {

// Calls task(context, i) once for every i in [0, num_tasks), on up to num_threads threads with the caller among them,
// and returns when all are done. Tasks are handed out in order, one at a time. May be called from several threads at
// once. A forked child starts afresh with a pool of its own. Tasks must not throw.
void parallel_for(int64_t num_tasks, int num_threads, void (*task)(void* context, int64_t index), void* context);

// The same for any callable.
template <typename Function>
void parallel_for(int64_t num_tasks, int num_threads, Function& function) {
  parallel_for(
      num_tasks, num_threads, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); },
      &function);
}

}  // namespace marlin_qqq::cpu
