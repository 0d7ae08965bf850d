#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/floating_point_environment.h"

namespace marlin_qqq::cpu {
namespace {

inline void pause_processor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One parallel_for. Lives on its caller's stack: a worker may touch it only between joining (under the pool's mutex)
// and its decrement of `active_workers`, which the caller waits for.
struct Job {
  void (*task)(void*, int64_t);
  void* context;
  int64_t num_tasks;
  int wanted_workers;                  // guarded by the pool's mutex
  std::atomic<int64_t> next{0};        // next task to hand out
  std::atomic<int> active_workers{0};  // workers inside

  void work() {
    const DefaultFloatingPointEnvironment environment;
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < num_tasks;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      task(context, i);
    }
  }
};

class ThreadPool {
 public:
  void run(Job& job) {
    const bool wants_one = job.wanted_workers == 1;  // once published, the count is the workers' to change
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(job.wanted_workers);
      jobs_.push_back(&job);
      num_jobs_.store(static_cast<int>(jobs_.size()), std::memory_order_release);
    }
    if (wants_one) {
      work_arrived_.notify_one();
    } else {
      work_arrived_.notify_all();
    }
    job.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto position = std::find(jobs_.begin(), jobs_.end(), &job);
      if (position != jobs_.end()) {
        jobs_.erase(position);
      }
      num_jobs_.store(static_cast<int>(jobs_.size()), std::memory_order_release);
    }
    // Nobody joins any more; those inside are at their last task.
    for (int spin = 0; job.active_workers.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < kSpins) {
        pause_processor();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        worker_left_.wait(lock, [&] { return job.active_workers.load(std::memory_order_acquire) == 0; });
      }
    }
  }

 private:
  // About ten microseconds: catches back-to-back products without burning a core between them.
  static constexpr int kSpins = 200;

  void start_workers(int wanted) {
    // Python delivers signals to the main thread; a worker must not take them.
    while (num_workers_ < wanted) {
      sigset_t all;
      sigset_t previous;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &previous);
      bool started = true;
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        started = false;  // no more threads to be had: the caller does their share
      }
      pthread_sigmask(SIG_SETMASK, &previous, nullptr);
      if (!started) {
        return;
      }
      ++num_workers_;
    }
  }

  [[noreturn]] void serve() {
    for (;;) {
      for (int spin = 0; spin < kSpins && num_jobs_.load(std::memory_order_acquire) == 0; ++spin) {
        pause_processor();
      }
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        work_arrived_.wait(lock, [this] { return !jobs_.empty(); });
        job = jobs_.front();
        job->active_workers.fetch_add(1, std::memory_order_relaxed);
        if (--job->wanted_workers == 0) {
          jobs_.erase(jobs_.begin());
          num_jobs_.store(static_cast<int>(jobs_.size()), std::memory_order_release);
        }
      }
      job->work();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        job->active_workers.fetch_sub(1, std::memory_order_release);
      }
      worker_left_.notify_all();  // not job's: the caller may be gone
    }
  }

  std::mutex mutex_;
  std::condition_variable work_arrived_;
  std::condition_variable worker_left_;
  std::vector<Job*> jobs_;        // that still want workers
  std::atomic<int> num_jobs_{0};  // jobs_.size(), to spin on without the mutex
  int num_workers_ = 0;
};

// Never destroyed: workers may outlive static destruction.
std::atomic<ThreadPool*> current_pool{nullptr};
std::mutex* creation_mutex = new std::mutex;
std::atomic<ThreadLender> current_lender{nullptr};

// A forked child has only the thread that forked: the parent's pool, whatever state its mutex is in, is left alone.
void forget_pool_in_child() {
  current_pool.store(nullptr);
  current_lender.store(nullptr);
  creation_mutex = new std::mutex;
}

void watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  (void)registered;
}

ThreadPool& pool() {
  ThreadPool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) {
    return *existing;
  }
  const std::lock_guard<std::mutex> lock(*creation_mutex);
  existing = current_pool.load(std::memory_order_acquire);
  if (existing == nullptr) {
    watch_forks();
    existing = new ThreadPool;
    current_pool.store(existing, std::memory_order_release);
  }
  return *existing;
}

}  // namespace

void borrow_threads(ThreadLender lender) {
  watch_forks();
  current_lender.store(lender);
}

void parallel_for(int64_t num_tasks, int num_threads, void (*task)(void* context, int64_t index), void* context) {
  if (num_tasks <= 0) {
    return;
  }
  constexpr int kMostThreads = 1024;
  const int64_t workers = std::min<int64_t>({num_tasks, num_threads, kMostThreads}) - 1;
  Job job{task, context, num_tasks, static_cast<int>(std::max<int64_t>(workers, 0))};
  if (job.wanted_workers == 0) {
    job.work();
  } else if (const ThreadLender lender = current_lender.load()) {
    lender(
        job.wanted_workers + 1, [](void* borrowed) { static_cast<Job*>(borrowed)->work(); }, &job);
  } else {
    pool().run(job);
  }
}

}  // namespace marlin_qqq::cpu
