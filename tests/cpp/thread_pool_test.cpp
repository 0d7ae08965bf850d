// parallel_for: every index once, from several callers, inside itself, and after a fork.
#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace marlin_qqq {
namespace {

using cpu::parallel_for;

// How often each of `count` indices was visited.
std::vector<int> visits(int64_t count, int num_threads) {
  std::vector<std::atomic<int>> counters(static_cast<size_t>(count));
  auto visit = [&](int64_t i) { counters[static_cast<size_t>(i)].fetch_add(1); };
  parallel_for(count, num_threads, visit);
  return {counters.begin(), counters.end()};
}

TEST(ParallelFor, VisitsEveryIndexOnce) {
  for (const int64_t count : {0, 1, 2, 3, 100, 1000}) {
    for (const int num_threads : {-1, 0, 1, 2, 3, 8}) {
      ASSERT_EQ(visits(count, num_threads), std::vector<int>(static_cast<size_t>(count), 1));
    }
  }
}

TEST(ParallelFor, UsesNoMoreThreadsThanAsked) {
  std::mutex mutex;
  std::set<std::thread::id> ids;
  auto note = [&](int64_t) {
    usleep(1000);
    const std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  };
  parallel_for(20, 8, note);
  EXPECT_GE(ids.size(), 2u);
  ids.clear();
  parallel_for(20, 2, note);
  EXPECT_LE(ids.size(), 2u);
  EXPECT_TRUE(ids.count(std::this_thread::get_id()) == 1) << "the caller works too";
}

TEST(ParallelFor, ManyShortJobsInARow) {
  for (int repeat = 0; repeat < 20'000; ++repeat) {
    std::atomic<int> sum{0};
    auto add = [&](int64_t i) { sum.fetch_add(static_cast<int>(i)); };
    parallel_for(4, 3, add);
    ASSERT_EQ(sum.load(), 6);
  }
}

TEST(ParallelFor, SeveralCallersAtOnce) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 500; ++repeat) {
        if (visits(17, 4) != std::vector<int>(17, 1)) wrong.fetch_add(1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ParallelFor, NestedCallsFinish) {
  std::atomic<int> sum{0};
  auto outer = [&](int64_t) {
    auto inner = [&](int64_t) { sum.fetch_add(1); };
    parallel_for(10, 3, inner);
  };
  parallel_for(10, 3, outer);
  EXPECT_EQ(sum.load(), 100);
}

// A child of fork has the pool's memory but none of its threads.
TEST(ParallelFor, WorksInAForkedChild) {
  ASSERT_EQ(visits(100, 4), std::vector<int>(100, 1));  // the parent's pool is up
  for (int repeat = 0; repeat < 5; ++repeat) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);  // a deadlock ends the child by signal
      const bool right = visits(100, 4) == std::vector<int>(100, 1) && visits(100, 4) == std::vector<int>(100, 1);
      _exit(right ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status)) << "killed by signal " << (WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    ASSERT_EQ(WEXITSTATUS(status), 0);
  }
  ASSERT_EQ(visits(100, 4), std::vector<int>(100, 1));
}

// A lender that runs the body on two threads of its own and counts its calls.
std::atomic<int> loans{0};
void lend_two_threads(int /*num_threads*/, void (*body)(void*), void* context) {
  loans.fetch_add(1);
  std::thread other(body, context);
  body(context);
  other.join();
}
// A lender without threads to spare (torch's inside a parallel region): the caller does it all.
void lend_nothing(int /*num_threads*/, void (*body)(void*), void* context) {
  loans.fetch_add(1);
  body(context);
}

TEST(ParallelFor, BorrowsThreads) {
  for (const cpu::ThreadLender lender : {lend_two_threads, lend_nothing}) {
    loans.store(0);
    cpu::borrow_threads(lender);
    EXPECT_EQ(visits(100, 4), std::vector<int>(100, 1));
    EXPECT_EQ(loans.load(), 1);
    EXPECT_EQ(visits(100, 1), std::vector<int>(100, 1));
    EXPECT_EQ(loans.load(), 1) << "one thread needs no loan";
    cpu::borrow_threads(nullptr);
    EXPECT_EQ(visits(100, 4), std::vector<int>(100, 1));
    EXPECT_EQ(loans.load(), 1);
  }
}

// The lender's threads do not survive a fork.
TEST(ParallelFor, AForkedChildDoesNotBorrow) {
  loans.store(0);
  cpu::borrow_threads(lend_two_threads);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);
    const bool right = visits(100, 4) == std::vector<int>(100, 1) && loans.load() == 0;
    _exit(right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  EXPECT_EQ(visits(100, 4), std::vector<int>(100, 1));
  EXPECT_EQ(loans.load(), 1) << "the parent still borrows";
  cpu::borrow_threads(nullptr);
}

// Forks while another thread is inside the pool.
TEST(ParallelFor, WorksInAChildForkedMeanwhile) {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop.load()) visits(50, 3);
  });
  for (int repeat = 0; repeat < 20; ++repeat) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);
      _exit(visits(100, 3) == std::vector<int>(100, 1) ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  }
  stop.store(true);
  busy.join();
}

}  // namespace
}  // namespace marlin_qqq
