// Tasks on the threads of XLA.

#ifndef NAS_NATIVE_THREADS_H_
#define NAS_NATIVE_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Calls `work(task)` for every task below `count`, on this thread and on those of XLA's pool that come to help.
//
// This thread takes tasks like any other, and at the end waits only for tasks that a helper has begun. It never waits
// for a helper to begin: where all threads of the pool are in this very function, none would.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto state = std::make_shared<State>();  // a helper may come when all is done and this function has returned
  const auto help = [state, count, &work] {
    int64_t done = 0;
    for (int64_t task; (task = state->next.fetch_add(1)) < count; ++done) work(task);
    if (done == 0) return;
    const std::lock_guard lock(state->mutex);
    state->done += done;
    if (state->done == count) state->all_done.notify_one();
  };
  for (int64_t helpers = std::min(pool.num_threads(), count) - 1; helpers > 0; --helpers) {
    pool.Schedule([help] { help(); });
  }
  help();
  std::unique_lock lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
}

}  // namespace

#endif  // NAS_NATIVE_THREADS_H_
