// A small persistent pool: starting threads costs more than a small product.
#pragma once

#include <cstdint>

namespace marlin_qqq::cpu {

// Where the threads come from, if not from the pool here: calls body(context) on up to num_threads threads, at least on
// the caller's, and returns when all calls have returned. torch lends its threads: its OpenMP workers spin for
// milliseconds after every op, and a second pool would fight them for the cores.
using ThreadLender = void (*)(int num_threads, void (*body)(void* context), void* context);

// From now on parallel_for borrows threads. In a forked child the pool here takes over again, because OpenMP's threads
// do not survive a fork either and GNU's would deadlock. nullptr: back to the pool.
void borrow_threads(ThreadLender lender);

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
