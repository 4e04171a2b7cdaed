// Depthwise convolution with its two gradients, and the sums over images that batch norm takes, on CPU, as handlers for
// XLA's foreign function interface.
//
// Images are [N, H, W, C], weights [kh, kw, 1, C], float32; SAME padding; any stride, image, kernel and channel count.
// build.py compiles this file, __init__.py registers its handlers. It is compiled for the baseline of the architecture;
// on x86-64 it also holds clones for wider vectors, one of which is chosen when it is loaded.
//
// A result never depends on the number of threads: each sum is taken by one thread in one order, and the parts of which
// a weight gradient is the sum depend on the shapes alone. Nor does a channel depend on how many there are beside it.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

// What a clone calls is compiled for its instructions only if it is inlined into it.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// Before a loop over an array that has to live in registers.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

namespace ffi = xla::ffi;
using Tensor = ffi::Buffer<ffi::F32, 4>;
using Result = ffi::Result<Tensor>;

constexpr int64_t kTile = 4;            // images of which an output is computed together, each weight loaded once
constexpr int64_t kTaskTaps = 1 << 16;  // multiplications in a task of a convolution: tens of microseconds
constexpr int64_t kParts = 16;          // partial sums of a weight gradient, each over neighbouring images
constexpr int64_t kPartChannels = 128;  // channels in a task of a weight gradient
constexpr int64_t kTaskValues = 1 << 15;  // values of an operand in a task of channel sums: they fit into a core's cache
constexpr int64_t kTaskPixels = 1 << 10;  // pixels in it at most: one after the other, more would lose digits

// ------------------------------------------------------------------------------------------------------------ geometry

// What an output meets along one axis: inputs `input`, `input` + 1, ... through taps `tap`, `tap` + step of the axis...
struct Reach {
  int64_t input, tap, count;
};

struct Axis {
  int64_t inputs, kernel, step;
  std::vector<Reach> outputs;

  int64_t size() const { return static_cast<int64_t>(outputs.size()); }
};

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Zeros before an axis: nas.kernels.same_padding.
int64_t Padding(int64_t image, int64_t kernel, int64_t stride) {
  return std::max<int64_t>((CeilDivide(image, stride) - 1) * stride + kernel - image, 0) / 2;
}

// From the image to its convolution. Taps beside the image meet zeros, and are left out.
Axis Forwards(int64_t image, int64_t kernel, int64_t stride) {
  Axis axis{image, kernel, 1, {}};
  for (int64_t output = 0; output < CeilDivide(image, stride); ++output) {
    const int64_t start = output * stride - Padding(image, kernel, stride);
    const int64_t tap = std::max<int64_t>(-start, 0), end = std::min(image - start, kernel);
    axis.outputs.push_back({start + tap, tap, std::max<int64_t>(end - tap, 0)});
  }
  return axis;
}

// From the gradient of the convolution to that of the image: pixel p meets the outputs o, 0 <= p - start(o) < kernel.
Axis Backwards(int64_t image, int64_t kernel, int64_t stride) {
  Axis axis{CeilDivide(image, stride), kernel, -stride, {}};
  for (int64_t pixel = 0; pixel < image; ++pixel) {
    const int64_t place = pixel + Padding(image, kernel, stride);
    const int64_t first = place < kernel ? 0 : CeilDivide(place - kernel + 1, stride);
    const int64_t last = std::min(place / stride, axis.inputs - 1);
    axis.outputs.push_back({first, place - first * stride, std::max<int64_t>(last - first + 1, 0)});
  }
  return axis;
}

struct Geometry {
  Axis rows, columns;
  int64_t channels;

  int64_t input_size() const { return rows.inputs * columns.inputs * channels; }
  int64_t output_size() const { return rows.size() * columns.size() * channels; }
  int64_t kernel_size() const { return rows.kernel * columns.kernel * channels; }
};

// ------------------------------------------------------------------------------------------------------------- vectors

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(N * sizeof(float))));
};
template <>
struct Lanes<1> {
  typedef float type;
};
template <int N>
using Vector = typename Lanes<N>::type;

template <int N>
INLINE Vector<N> Load(const float* from) {
  Vector<N> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <int N>
INLINE void Store(float* to, Vector<N> v) {
  std::memcpy(to, &v, sizeof(v));
}

// Calls `work.Block<lanes, vectors>(c)` for blocks of lanes * vectors channels that cover [begin, end): N lanes, or fewer
// where there are fewer channels, and B vectors as far as they go, as longer stretches of memory are faster. The last
// block overlaps the one before it and computes some values twice, instead of leaving a remainder.
template <int N, int B, typename Work>
INLINE void ForChannels(const Work& work, int64_t begin, int64_t end) {
  if constexpr (N > 1) {
    if (end - begin < N) return ForChannels<(N > 4 ? 4 : 1), 1>(work, begin, end);
  }
  int64_t c = begin;
  for (; c + B * N <= end; c += B * N) work.template Block<N, B>(c);
  if constexpr (B > 1) {
    if (c < end) ForChannels<N, B / 2>(work, std::max(begin, std::min(c, end - N)), end);
  } else {
    if (c < end) work.template Block<N, 1>(end - N);
  }
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

// Calls `at(pixels, weight)` for each tap on the image of output (y, x), where `pixels` is the offset of the pixel it
// meets in an image, and `weight` that of the tap in a kernel.
template <typename At>
INLINE void ForTaps(const Geometry& geometry, int64_t y, int64_t x, const At& at) {
  const Axis &rows = geometry.rows, &columns = geometry.columns;
  const Reach down = rows.outputs[y], across = columns.outputs[x];
  const int64_t channels = geometry.channels, step = columns.step * channels;
  for (int64_t i = 0; i < down.count; ++i) {
    int64_t pixel = ((down.input + i) * columns.inputs + across.input) * channels;
    int64_t weight = ((down.tap + i * rows.step) * columns.kernel + across.tap) * channels;
    for (int64_t j = 0; j < across.count; ++j, pixel += channels, weight += step) at(pixel, weight);
  }
}

// Convolves images [image_begin, image_end), at most kTile, to rows [row_begin, row_end) of their outputs.
struct Convolution {
  const Geometry& geometry;
  const float* in;
  const float* weights;
  float* out;
  int64_t image_begin, image_end, row_begin, row_end;

  template <int N, int B>
  INLINE void Block(int64_t c) const {
    if (image_end - image_begin == kTile) return Images<N, B, kTile>(c, image_begin);
    for (int64_t image = image_begin; image < image_end; ++image) Images<N, B, 1>(c, image);
  }

  template <int N, int B, int X>
  INLINE void Images(int64_t c, int64_t image) const {
    const int64_t columns = geometry.columns.size(), in_size = geometry.input_size(), out_size = geometry.output_size();
    for (int64_t y = row_begin; y < row_end; ++y) {
      for (int64_t x = 0; x < columns; ++x) {
        Vector<N> sums[X][B] = {};
        ForTaps(geometry, y, x, [&](int64_t pixel, int64_t weight) INLINE_LAMBDA {
          UNROLL for (int b = 0; b < B; ++b) {
            const Vector<N> w = Load<N>(weights + weight + c + b * N);
            const float* pixels = in + image * in_size + pixel + c + b * N;
            UNROLL for (int n = 0; n < X; ++n) sums[n][b] += w * Load<N>(pixels + n * in_size);
          }
        });
        float* to = out + image * out_size + (y * columns + x) * geometry.channels + c;
        UNROLL for (int n = 0; n < X; ++n) {
          UNROLL for (int b = 0; b < B; ++b) Store<N>(to + n * out_size + b * N, sums[n][b]);
        }
      }
    }
  }
};

// The weight gradient of images [image_begin, image_end), to `sums` [kh, kw, 1, C].
struct Part {
  const Geometry& geometry;
  const float* in;
  const float* gradient;
  float* sums;
  int64_t image_begin, image_end;

  template <int N, int B>
  INLINE void Block(int64_t c) const {
    int64_t image = image_begin;
    for (int64_t k = 0; k < geometry.kernel_size(); k += geometry.channels) {
      UNROLL for (int b = 0; b < B; ++b) Store<N>(sums + k + c + b * N, Vector<N>{});
    }
    for (; image + kTile <= image_end; image += kTile) Images<N, B, kTile>(c, image);
    for (; image < image_end; ++image) Images<N, B, 1>(c, image);
  }

  template <int N, int B, int X>
  INLINE void Images(int64_t c, int64_t image) const {
    const int64_t columns = geometry.columns.size(), in_size = geometry.input_size(), out_size = geometry.output_size();
    for (int64_t y = 0; y < geometry.rows.size(); ++y) {
      for (int64_t x = 0; x < columns; ++x) {
        const float* from = gradient + image * out_size + (y * columns + x) * geometry.channels + c;
        Vector<N> g[X][B];
        UNROLL for (int n = 0; n < X; ++n) {
          UNROLL for (int b = 0; b < B; ++b) g[n][b] = Load<N>(from + n * out_size + b * N);
        }
        ForTaps(geometry, y, x, [&](int64_t pixel, int64_t weight) INLINE_LAMBDA {
          UNROLL for (int b = 0; b < B; ++b) {
            float* sum = sums + weight + c + b * N;
            const float* pixels = in + image * in_size + pixel + c + b * N;
            Vector<N> total = Load<N>(sum);
            UNROLL for (int n = 0; n < X; ++n) total += g[n][b] * Load<N>(pixels + n * in_size);
            Store<N>(sum, total);
          }
        });
      }
    }
  }
};

// Of pixels [pixel_begin, pixel_end): for each channel the sum of a - a_shift, to `sums` [C], and that of
// (a - a_shift) * (b - b_shift), to `products` [C].
struct Pixels {
  const float *a, *b, *a_shift, *b_shift;
  float *sums, *products;
  int64_t channels, pixel_begin, pixel_end;

  template <int N, int B>
  INLINE void Block(int64_t c) const {
    Vector<N> from_a[B], from_b[B], sum[B] = {}, product[B] = {};
    UNROLL for (int i = 0; i < B; ++i) {
      from_a[i] = Load<N>(a_shift + c + i * N);
      from_b[i] = Load<N>(b_shift + c + i * N);
    }
    for (int64_t at = pixel_begin * channels + c; at < pixel_end * channels; at += channels) {
      UNROLL for (int i = 0; i < B; ++i) {
        const Vector<N> x = Load<N>(a + at + i * N) - from_a[i];
        sum[i] += x;
        product[i] += x * (Load<N>(b + at + i * N) - from_b[i]);
      }
    }
    UNROLL for (int i = 0; i < B; ++i) {
      Store<N>(sums + c + i * N, sum[i]);
      Store<N>(products + c + i * N, product[i]);
    }
  }
};

// -------------------------------------------------------------------------------------------------------------- clones

struct Clone {
  const char* name;
  bool (*runs_here)();
  void (*convolve)(const Convolution&);
  void (*sum)(const Part&, int64_t channel_begin, int64_t channel_end);
  void (*reduce)(const Pixels&);
};

#define CLONE(name, runs_here, attribute, lanes, vectors)                                              \
  attribute void name##Convolve(const Convolution& task) {                                             \
    ForChannels<lanes, vectors>(task, 0, task.geometry.channels);                                      \
  }                                                                                                    \
  attribute void name##Sum(const Part& part, int64_t channel_begin, int64_t channel_end) {             \
    ForChannels<lanes, vectors>(part, channel_begin, channel_end);                                     \
  }                                                                                                    \
  attribute void name##Reduce(const Pixels& pixels) {                                                  \
    ForChannels<lanes, vectors>(pixels, 0, pixels.channels);                                           \
  }                                                                                                    \
  constexpr Clone name{#name, [] { return static_cast<bool>(runs_here); }, name##Convolve, name##Sum, name##Reduce}

CLONE(baseline, true, , 4, 2);
#if defined(__x86_64__)
#define RUNS(instructions) __builtin_cpu_supports(instructions)
#define FOR(instructions) __attribute__((target(instructions)))
CLONE(avx2, RUNS("avx2") && RUNS("fma"), FOR("avx2,fma"), 8, 2);
CLONE(avx512, RUNS("avx512f") && RUNS("fma"), FOR("avx512f,fma"), 16, 4);  // fma is not part of it: narrow remainders
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

// ------------------------------------------------------------------------------------------------------------- threads

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

// ------------------------------------------------------------------------------------------------------------ handlers

// Whether `image` [N, H, W, C] and `weights` [kh, kw, 1, C] give `outputs` [N, ceil(H / stride), ceil(W / stride), C].
template <typename Image, typename Weights, typename Outputs>
ffi::Error Check(const Image& image, const Weights& weights, const Outputs& outputs, int64_t stride) {
  const auto x = image.dimensions(), w = weights.dimensions(), y = outputs.dimensions();
  const bool fits = stride > 0 && w[2] == 1 && x[3] == w[3] && x[3] == y[3] && x[0] == y[0] &&
                    y[1] == CeilDivide(x[1], stride) && y[2] == CeilDivide(x[2], stride);
  return fits ? ffi::Error::Success() : ffi::Error::InvalidArgument("depthwise: shapes that do not fit together");
}

void Convolve(ffi::ThreadPool& pool, const Geometry& geometry, int64_t images, const float* in, const float* weights,
              float* out) {
  if (images * geometry.output_size() == 0) return;
  const int64_t rows = geometry.rows.size();
  const int64_t row_taps = kTile * geometry.columns.size() * geometry.kernel_size();
  const int64_t band = std::clamp<int64_t>(kTaskTaps / row_taps, 1, rows), bands = CeilDivide(rows, band);
  Parallel(pool, CeilDivide(images, kTile) * bands, [&](int64_t task) {
    const int64_t image = task / bands * kTile, row = task % bands * band;
    Chosen().convolve({geometry, in, weights, out, image, std::min(image + kTile, images), row,
                       std::min(row + band, rows)});
  });
}

ffi::Error Forward(ffi::ThreadPool pool, Tensor x, Tensor w, Result y, int64_t stride) {
  if (ffi::Error error = Check(x, w, *y, stride); error.failure()) return error;
  const auto image = x.dimensions(), kernel = w.dimensions();
  const Geometry geometry{Forwards(image[1], kernel[0], stride), Forwards(image[2], kernel[1], stride), image[3]};
  Convolve(pool, geometry, image[0], x.typed_data(), w.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error InputGradient(ffi::ThreadPool pool, Tensor g, Tensor w, Result dx, int64_t stride) {
  if (ffi::Error error = Check(*dx, w, g, stride); error.failure()) return error;
  const auto image = dx->dimensions(), kernel = w.dimensions();
  const Geometry geometry{Backwards(image[1], kernel[0], stride), Backwards(image[2], kernel[1], stride), image[3]};
  Convolve(pool, geometry, image[0], g.typed_data(), w.typed_data(), dx->typed_data());
  return ffi::Error::Success();
}

ffi::Error WeightGradient(ffi::ThreadPool pool, Tensor x, Tensor g, Result dw, int64_t stride) {
  if (ffi::Error error = Check(x, *dw, g, stride); error.failure()) return error;
  const auto image = x.dimensions(), kernel = dw->dimensions();
  const Geometry geometry{Forwards(image[1], kernel[0], stride), Forwards(image[2], kernel[1], stride), image[3]};
  const int64_t images = image[0], channels = image[3], size = geometry.kernel_size();
  const int64_t part_images = std::max<int64_t>(CeilDivide(images, kParts), 1), parts = CeilDivide(images, part_images);
  const int64_t ranges = CeilDivide(channels, kPartChannels);
  std::vector<float> sums(parts * size);
  Parallel(pool, parts * ranges, [&](int64_t task) {
    const int64_t part = task / ranges, first = part * part_images, begin = task % ranges * kPartChannels;
    Chosen().sum({geometry, x.typed_data(), g.typed_data(), sums.data() + part * size, first,
                  std::min(first + part_images, images)},
                 begin, std::min(begin + kPartChannels, channels));
  });
  std::fill_n(dw->typed_data(), size, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t k = 0; k < size; ++k) dw->typed_data()[k] += sums[part * size + k];
  }
  return ffi::Error::Success();
}

using Channels = ffi::Buffer<ffi::F32, 1>;
using Sums = ffi::Buffer<ffi::F32, 2>;

// For each channel the sums, over all pixels of all images, of a - a_shift and of (a - a_shift) * (b - b_shift): [2, C].
ffi::Error ChannelSums(ffi::ThreadPool pool, Tensor a, Tensor b, Channels a_shift, Channels b_shift,
                       ffi::Result<Sums> sums) {
  const int64_t channels = a_shift.element_count(), values = a.element_count();
  const bool fits = a.dimensions() == b.dimensions() && a.dimensions()[3] == channels &&
                    b_shift.element_count() == a_shift.element_count() &&
                    static_cast<int64_t>(sums->element_count()) == 2 * channels;
  if (!fits) {
    return ffi::Error::InvalidArgument("channel sums: shapes that do not fit together");
  }
  const int64_t pixels = channels == 0 ? 0 : values / channels;
  const int64_t part_pixels = std::clamp<int64_t>(kTaskValues / std::max<int64_t>(channels, 1), 1, kTaskPixels);
  const int64_t parts = CeilDivide(pixels, part_pixels);
  std::vector<float> of_part(parts * 2 * channels);
  Parallel(pool, parts, [&](int64_t part) {
    float* to = of_part.data() + part * 2 * channels;
    Chosen().reduce({a.typed_data(), b.typed_data(), a_shift.typed_data(), b_shift.typed_data(), to, to + channels,
                     channels, part * part_pixels, std::min((part + 1) * part_pixels, pixels)});
  });
  std::vector<double> total(2 * channels);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t k = 0; k < 2 * channels; ++k) total[k] += of_part[part * 2 * channels + k];
  }
  std::copy(total.begin(), total.end(), sums->typed_data());
  return ffi::Error::Success();
}

}  // namespace

#define BINDING \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>().Ret<Tensor>().Attr<int64_t>("stride")
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_depthwise_forward, Forward, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_depthwise_input_gradient, InputGradient, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_depthwise_weight_gradient, WeightGradient, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_channel_sums, ChannelSums,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>()
                                  .Arg<Channels>().Arg<Channels>().Ret<Sums>());

// What __init__.py asks: the hash of the source that this was compiled from, and the clone that is in use.
extern "C" const char* nas_native_source() { return NAS_SOURCE; }
extern "C" const char* nas_native_instructions() { return Chosen().name; }
