// The arithmetic for each set of instructions, and which of them this machine runs.

#ifndef NAS_NATIVE_CLONES_H_
#define NAS_NATIVE_CLONES_H_

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "arithmetic.h"

namespace {

struct Clone {
  const char* name;
  bool (*runs_here)();
  void (*reduce)(const Pixels&);
  void (*convolve)(const Strip&);
  void (*sum)(const Taps&);
  void (*enter)(const Prologue&);
  void (*leave)(const Pullback&);
  void (*total)(const Total&);
  void (*copy)(const Copy&);
  void (*multiply)(const Product&);
};

// Calls the function for one of the activations.
#define PICK(function, task, activation)                   \
  switch (activation) {                                    \
    case kRelu: return function<kRelu>(task);              \
    case kRelu6: return function<kRelu6>(task);            \
    case kHardSwish: return function<kHardSwish>(task);    \
    case kSwish: return function<kSwish>(task);            \
    default: return function<kNone>(task);                 \
  }

// Or for what else an ending does.
#define PICK_ENDING(function, task)                                         \
  switch (const int64_t how = (task).ending.how()) {                        \
    case Ending::kNothing: return function<Ending::kNothing>(task);         \
    case Ending::kMoments: return function<Ending::kMoments>(task);         \
    case Ending::kSum: return function<Ending::kSum>(task);                 \
    default: PICK(function, task, how)                                      \
  }

#define CLONE(name, runs_here, attribute, lanes, vectors, rows)                                               \
  attribute void name##Reduce(const Pixels& task) { ForChannels<lanes, vectors>(task, 0, task.channels); }    \
  template <int How>                                                                                          \
  attribute void name##ConvolveAs(const Strip& task) {                                                        \
    task.All<How, lanes>();                                                                                   \
  }                                                                                                           \
  void name##Convolve(const Strip& task) { PICK_ENDING(name##ConvolveAs, task); }                             \
  attribute void name##Sum(const Taps& task) { task.All<lanes>(); }                                           \
  template <int A>                                                                                            \
  attribute void name##EnterAs(const Prologue& task) {                                                        \
    task.All<lanes, A>();                                                                                     \
  }                                                                                                           \
  template <int A>                                                                                            \
  attribute void name##LeaveAs(const Pullback& task) {                                                        \
    task.All<lanes, A>();                                                                                     \
  }                                                                                                           \
  void name##Enter(const Prologue& task) { PICK(name##EnterAs, task, task.activation); }                      \
  void name##Leave(const Pullback& task) { PICK(name##LeaveAs, task, task.activation); }                      \
  attribute void name##Total(const Total& task) { task.All<lanes>(); }                                        \
  attribute void name##Duplicate(const Copy& task) { task.All<lanes>(); }                                     \
  template <int How>                                                                                          \
  attribute void name##MultiplyAs(const Product& task) {                                                      \
    task.All<How, lanes, vectors, rows>();                                                                    \
  }                                                                                                           \
  void name##Multiply(const Product& task) { PICK_ENDING(name##MultiplyAs, task); }                           \
  constexpr Clone name{#name,        [] { return static_cast<bool>(runs_here); },                             \
                       name##Reduce, name##Convolve,                                                          \
                       name##Sum,    name##Enter,                                                             \
                       name##Leave,  name##Total,                                                             \
                       name##Duplicate, name##Multiply}

CLONE(baseline, true, , 4, 2, 4);
#if defined(__x86_64__)
#define RUNS(instructions) __builtin_cpu_supports(instructions)
#define FOR(instructions) __attribute__((target(instructions)))
CLONE(avx2, RUNS("avx2") && RUNS("fma"), FOR("avx2,fma"), 8, 2, 5);
CLONE(avx512, RUNS("avx512f") && RUNS("fma"), FOR("avx512f,fma"), 16, 4, 6);  // fma is not part of it: narrow remainders
constexpr Clone kWidestFirst[] = {avx512, avx2, baseline};
#else
constexpr Clone kWidestFirst[] = {baseline};
#endif

// The widest clone that this machine can run, or the one that NAS_NATIVE names.
const Clone& Chosen() {
  static const Clone& chosen = []() -> const Clone& {
    const char* name = std::getenv("NAS_NATIVE");
    for (const Clone& clone : kWidestFirst) {
      if (name != nullptr && std::strcmp(name, clone.name) == 0 && clone.runs_here()) return clone;
    }
    const auto runs_here = [](const Clone& clone) { return clone.runs_here(); };
    return *std::find_if(std::begin(kWidestFirst), std::end(kWidestFirst), runs_here);
  }();
  return chosen;
}

}  // namespace

#endif  // NAS_NATIVE_CLONES_H_
