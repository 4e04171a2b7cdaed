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
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

// What a clone calls is compiled for its instructions only if it is inlined into it.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// Before a loop over an array that has to live in registers.
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_ALL _Pragma("GCC unroll 32")

namespace {

namespace ffi = xla::ffi;
using Tensor = ffi::Buffer<ffi::F32, 4>;
using Result = ffi::Result<Tensor>;

constexpr int64_t kLanes = 16;            // channels that a depthwise convolution computes together: a line of cache
constexpr int64_t kSliceValues = 1 << 17;  // values that a task of it holds at a time: they stay in a core's second cache
constexpr int64_t kTileValues = 1 << 15;  // values of an operand that a task holds at a time: they stay in a core's cache
constexpr int64_t kParts = 16;            // partial sums of a weight gradient, each over neighbouring images or pixels
constexpr int64_t kMergeValues = 1 << 12;  // of a weight gradient, in a task that adds its parts
constexpr int64_t kTaskPixels = 1 << 10;   // of channel sums in a task at most: one after the other, more lose digits

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

// Outputs first, first + step, ... of a row, which meet a row of input with zeros around it: output n and tap t meet its
// pixel `pixel` + n * stride + t * pixel_step, through column `tap` + t * tap_step of the kernel.
struct Phase {
  int64_t count, first, step, taps, tap, tap_step, pixel, pixel_step, stride;
};

struct Columns {
  int64_t left, width;  // zeros before a row of input, its width with the zeros on both sides
  std::vector<Phase> phases;
};

Columns ColumnsForwards(int64_t image, int64_t kernel, int64_t stride) {
  const int64_t left = Padding(image, kernel, stride), outputs = CeilDivide(image, stride);
  return {left, std::max(left + image, (outputs - 1) * stride + kernel),
          {{outputs, 0, 1, kernel, 0, 1, 0, 1, stride}}};
}

// Pixels that agree modulo the stride meet the same taps.
Columns ColumnsBackwards(int64_t image, int64_t kernel, int64_t stride) {
  const int64_t padding = Padding(image, kernel, stride), outputs = CeilDivide(image, stride);
  Columns columns{0, outputs, {}};
  for (int64_t first = 0; first < std::min(stride, image); ++first) {
    const int64_t tap = (first + padding) % stride, taps = std::max<int64_t>(CeilDivide(kernel - tap, stride), 0);
    columns.phases.push_back({CeilDivide(image - first, stride), first, stride, taps, tap, stride,
                              (first + padding) / stride, -1, 1});
    columns.left = std::max(columns.left, taps - 1 - (first + padding) / stride);
  }
  for (Phase& phase : columns.phases) {
    phase.pixel += columns.left;
    columns.width = std::max(columns.width, phase.pixel - columns.left + phase.count);
  }
  columns.width += columns.left;
  return columns;
}

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
struct IntLanes {
  typedef int32_t type __attribute__((vector_size(N * sizeof(int32_t))));
};
template <>
struct IntLanes<1> {
  typedef int32_t type;
};
template <int N>
using Bits = typename IntLanes<N>::type;

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

// A depthwise convolution of kLanes channels of one image.
struct Strip {
  const Axis& rows;
  const Columns& columns;
  const float* in;      // [rows.inputs, columns.width, kLanes], zeros around each row
  const float* kernel;  // [kh, kw, kLanes]
  int64_t kernel_width;
  float* out;  // [rows.size(), out_width, kLanes]
  int64_t out_width;

  template <int N>
  INLINE void All() const {
    for (int64_t y = 0; y < rows.size(); ++y) {
      for (const Phase& phase : columns.phases) {
        if (phase.stride == 1 && phase.taps == 3) Row<N, 1, 3>(phase, y);
        else if (phase.stride == 1 && phase.taps == 5) Row<N, 1, 5>(phase, y);
        else if (phase.stride == 1 && phase.taps == 7) Row<N, 1, 7>(phase, y);
        else if (phase.stride == 2 && phase.taps == 3) Row<N, 2, 3>(phase, y);
        else if (phase.stride == 2 && phase.taps == 5) Row<N, 2, 5>(phase, y);
        else if (phase.stride == 2 && phase.taps == 7) Row<N, 2, 7>(phase, y);
        else Row<N, 0, 0>(phase, y);
      }
    }
  }

  // Of stride S and K taps; 0: any.
  template <int N, int S, int K>
  INLINE void Row(const Phase& phase, int64_t y) const {
    constexpr int X = N == 16 && S != 2 ? 8 : 4;  // what they meet lives in registers, with their sums
    int64_t n = 0;
    for (; n + X <= phase.count; n += X) Outputs<N, S, K, X>(phase, y, n);
    if constexpr (X > 4) {
      if (n + 4 <= phase.count) Outputs<N, S, K, 4>(phase, y, n), n += 4;
    }
    for (; n < phase.count; ++n) Outputs<N, S, K, 1>(phase, y, n);
  }

  template <int N, int S, int K, int X>
  INLINE void Outputs(const Phase& phase, int64_t y, int64_t n) const {
    const Reach down = rows.outputs[y];
    for (int64_t lane = 0; lane < kLanes; lane += N) {
      Vector<N> sums[X] = {};
      for (int64_t i = 0; i < down.count; ++i) {
        const float* pixel = in + ((down.input + i) * columns.width + phase.pixel + n * phase.stride) * kLanes + lane;
        const float* weight = kernel + ((down.tap + i * rows.step) * kernel_width + phase.tap) * kLanes + lane;
        if constexpr (K > 0) {
          Meet<N, S, K, X>(phase, pixel, weight, sums);
        } else {
          for (int64_t j = 0; j < phase.taps; ++j) {
            const Vector<N> w = Load<N>(weight + j * phase.tap_step * kLanes);
            const float* from = pixel + j * phase.pixel_step * kLanes;
            UNROLL for (int x = 0; x < X; ++x) sums[x] += w * Load<N>(from + x * phase.stride * kLanes);
          }
        }
      }
      float* to = out + (y * out_width + phase.first + n * phase.step) * kLanes + lane;
      UNROLL for (int x = 0; x < X; ++x) Store<N>(to + x * phase.step * kLanes, sums[x]);
    }
  }

  // One row of the kernel: each pixel is loaded once, for all outputs that meet it.
  template <int N, int S, int K, int X, typename Sums>
  INLINE void Meet(const Phase& phase, const float* pixel, const float* weight, Sums& sums) const {
    constexpr int kPixels = (X - 1) * S + K;
    Vector<N> w[K], pixels[kPixels];
    if (phase.pixel_step < 0) {  // from the last tap to the first
      pixel -= (K - 1) * kLanes;
      UNROLL_ALL for (int j = 0; j < K; ++j) w[j] = Load<N>(weight + (K - 1 - j) * phase.tap_step * kLanes);
    } else {
      UNROLL_ALL for (int j = 0; j < K; ++j) w[j] = Load<N>(weight + j * phase.tap_step * kLanes);
    }
    UNROLL_ALL for (int p = 0; p < kPixels; ++p) pixels[p] = Load<N>(pixel + p * kLanes);
    UNROLL_ALL for (int j = 0; j < K; ++j) {
      UNROLL_ALL for (int x = 0; x < X; ++x) sums[x] += w[j] * pixels[x * S + j];
    }
  }
};

// Adds the weight gradient of kLanes channels of one image to `sums` [kh, kw, kLanes].
struct Taps {
  int64_t kernel, kernel_width, stride, padding;  // kernel: rows; padding: rows before the image
  const float* in;                                // [height, in_width, kLanes], zeros around each row
  int64_t height, in_width;
  const float* gradient;  // [outputs, gradient_width, kLanes], from its first pixel on
  int64_t outputs, out_columns, gradient_width;
  float* sums;

  template <int N>
  INLINE void All() const {
    for (int64_t i = 0; i < kernel; ++i) {
      int64_t j = 0;
      for (; j + 7 <= kernel_width; j += 7) OfColumns<N, 7, (N == 16 ? 2 : 1)>(i, j);
      if (j + 5 <= kernel_width) OfColumns<N, 5, 2>(i, j), j += 5;
      if (j + 3 <= kernel_width) OfColumns<N, 3, 2>(i, j), j += 3;
      for (; j < kernel_width; ++j) OfColumns<N, 1, 2>(i, j);
    }
  }

  // Of J columns from `first` on of kernel row i; X neighbouring outputs have sums of their own.
  template <int N, int J, int X>
  INLINE void OfColumns(int64_t i, int64_t first) const {
    const int64_t begin = CeilDivide(std::max<int64_t>(padding - i, 0), stride), last = height - 1 - i + padding;
    const int64_t end = last < 0 ? 0 : std::min(outputs, last / stride + 1);
    for (int64_t lane = 0; lane < kLanes; lane += N) {
      Vector<N> totals[X][J] = {};
      for (int64_t y = begin; y < end; ++y) {
        const float* g = gradient + y * gradient_width * kLanes + lane;
        const float* pixel = in + ((y * stride + i - padding) * in_width + first) * kLanes + lane;
        int64_t x = 0;
        for (; x + X <= out_columns; x += X) AddPixels<N, J, X>(g + x * kLanes, pixel + x * stride * kLanes, totals);
        for (; x < out_columns; ++x) AddPixels<N, J, 1>(g + x * kLanes, pixel + x * stride * kLanes, totals);
      }
      UNROLL for (int j = 0; j < J; ++j) {
        float* sum = sums + (i * kernel_width + first + j) * kLanes + lane;
        Vector<N> total = totals[0][j];
        UNROLL for (int x = 1; x < X; ++x) total += totals[x][j];
        Store<N>(sum, Load<N>(sum) + total);
      }
    }
  }

  template <int N, int J, int X, typename Totals>
  INLINE void AddPixels(const float* g, const float* pixel, Totals& totals) const {
    UNROLL for (int x = 0; x < X; ++x) {
      const Vector<N> value = Load<N>(g + x * kLanes);
      UNROLL for (int j = 0; j < J; ++j) totals[x][j] += value * Load<N>(pixel + (x * stride + j) * kLanes);
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

// -------------------------------------------------------------------------------------------- between convolutions

// What stands between two convolutions: batch norm and an activation. The numbers are those of native.ACTIVATIONS.
enum Activation : int64_t { kNone, kRelu, kRelu6, kHardSwish, kSwish };

template <int N>
INLINE Vector<N> Clamp(Vector<N> x, float low, float high) {  // NaN stays NaN
  const Vector<N> least = Vector<N>{} + low, most = Vector<N>{} + high;
  const Vector<N> raised = x < least ? least : x;
  return raised > most ? most : raised;
}

// exp(x) to 2 ulp, the same bits in every lane count: Cephes' polynomial after taking out powers of 2.
template <int N>
INLINE Vector<N> Exp(Vector<N> x) {
  x = Clamp<N>(x, -87.0f, 88.0f);
  const Vector<N> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to whole numbers, in the low bits
  const Vector<N> whole = shifted - 12582912.0f;
  const Vector<N> r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  Vector<N> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Bits<N> power, scale;
  std::memcpy(&power, &shifted, sizeof(power));
  scale = (power << 23) + 0x3f800000;  // what is above the low 9 bits falls out
  Vector<N> factor;
  std::memcpy(&factor, &scale, sizeof(factor));
  return p * factor;
}

template <int A, int N>
INLINE Vector<N> Activate(Vector<N> x) {
  if constexpr (A == kRelu) return x < 0.0f ? Vector<N>{} : x;
  if constexpr (A == kRelu6) return Clamp<N>(x, 0.0f, 6.0f);
  if constexpr (A == kHardSwish) return x * Clamp<N>(x + 3.0f, 0.0f, 6.0f) * (1 / 6.0f);
  if constexpr (A == kSwish) return x / (1.0f + Exp<N>(-x));
  return x;
}

// gradient * the derivative of the activation at x.
template <int A, int N>
INLINE Vector<N> Deactivate(Vector<N> x, Vector<N> gradient) {
  const Vector<N> zero{};
  if constexpr (A == kRelu) return x > 0.0f ? gradient : zero;
  if constexpr (A == kRelu6) return x > 0.0f ? (x < 6.0f ? gradient : zero) : zero;
  if constexpr (A == kHardSwish) {
    const Vector<N> inside = x > -3.0f ? (x < 3.0f ? x : zero) : zero;
    return gradient * (Clamp<N>(x + 3.0f, 0.0f, 6.0f) + inside) * (1 / 6.0f);
  }
  if constexpr (A == kSwish) {
    const Vector<N> s = 1.0f / (1.0f + Exp<N>(-x));
    return gradient * s * (1.0f + x * (1.0f - s));
  }
  return gradient;
}

// Pixels [rows, pixels] of an operand or of scratch memory: a row is `row` after the one before it, a pixel `pixel`, and
// kLanes channels `block`: in an operand they lie together.
template <typename Float>
struct Strided {
  Float* data;
  int64_t row, pixel, block = kLanes;

  INLINE Float* At(int64_t y, int64_t x) const { return data + y * row + x * pixel; }
};
using In = Strided<const float>;
using Out = Strided<float>;

struct Extent {
  int64_t rows, pixels, channels;
};

// Calls `at(lanes, c)` for all channels c of a pixel, N at a time, the last ones fewer.
template <int N, typename At>
INLINE void ForLanes(int64_t channels, const At& at) {
  int64_t c = 0;
  for (; c + N <= channels; c += N) at(std::integral_constant<int, N>(), c);
  if constexpr (N > 8) {
    if (c + 8 <= channels) at(std::integral_constant<int, 8>(), c), c += 8;
  }
  if constexpr (N > 4) {
    if (c + 4 <= channels) at(std::integral_constant<int, 4>(), c), c += 4;
  }
  for (; c < channels; ++c) at(std::integral_constant<int, 1>(), c);
}

// Where channel c of a pixel lies: a block may be anywhere.
INLINE int64_t Lane(int64_t c, int64_t block) { return c / kLanes * block + c % kLanes; }

// The tasks below go through memory pixel by pixel, in its order, and keep what belongs to a channel in the first cache:
// channel by channel, every access would wait for memory (measured: 2 times slower).

// The norm and activation before a convolution: act((x - centre) * scale + offset), to `to`.
struct Prologue {
  Extent extent;
  In x;
  const float *centre, *scale, *offset;
  int64_t activation;
  Out to;

  template <int N, int A>
  INLINE void All() const {
    for (int64_t row = 0; row < extent.rows; ++row) {
      for (int64_t pixel = 0; pixel < extent.pixels; ++pixel) {
        const float* from = x.At(row, pixel);
        float* out = to.At(row, pixel);
        ForLanes<N>(extent.channels, [&](auto lanes, int64_t c) INLINE_LAMBDA {
          constexpr int M = lanes.value;
          const Vector<M> centred = Load<M>(from + Lane(c, x.block)) - Load<M>(centre + c);
          Store<M>(out + Lane(c, to.block), Activate<A, M>(centred * Load<M>(scale + c) + Load<M>(offset + c)));
        });
      }
    }
  }
};

// Its gradient: `gradient` is that of what was read; that of x goes to `to`, those of offset and scale are added to
// `sums` [2, channels].
struct Pullback : Prologue {
  In gradient;
  float* sums;

  template <int N, int A>
  INLINE void All() const {
    float* products = sums + extent.channels;
    for (int64_t row = 0; row < extent.rows; ++row) {
      for (int64_t pixel = 0; pixel < extent.pixels; ++pixel) {
        const float *from = x.At(row, pixel), *incoming = gradient.At(row, pixel);
        float* out = to.At(row, pixel);
        ForLanes<N>(extent.channels, [&](auto lanes, int64_t c) INLINE_LAMBDA {
          constexpr int M = lanes.value;
          const Vector<M> centred = Load<M>(from + Lane(c, x.block)) - Load<M>(centre + c), s = Load<M>(scale + c);
          const Vector<M> normed = centred * s + Load<M>(offset + c);
          const Vector<M> g = Deactivate<A, M>(normed, Load<M>(incoming + Lane(c, gradient.block)));
          Store<M>(sums + c, Load<M>(sums + c) + g);
          Store<M>(products + c, Load<M>(products + c) + g * centred);
          Store<M>(out + Lane(c, to.block), g * s);
        });
      }
    }
  }
};

// The gradient of a result of which the moments were taken: gradient + constant + slope * (y - mean), to `to`.
struct Total {
  Extent extent;
  In gradient, y;
  const float *constant, *slope, *mean;
  Out to;

  template <int N>
  INLINE void All() const {
    for (int64_t row = 0; row < extent.rows; ++row) {
      for (int64_t pixel = 0; pixel < extent.pixels; ++pixel) {
        const float *incoming = gradient.At(row, pixel), *from = y.At(row, pixel);
        float* out = to.At(row, pixel);
        ForLanes<N>(extent.channels, [&](auto lanes, int64_t c) INLINE_LAMBDA {
          constexpr int M = lanes.value;
          const Vector<M> centred = Load<M>(from + Lane(c, y.block)) - Load<M>(mean + c);
          const Vector<M> measured = Load<M>(constant + c) + Load<M>(slope + c) * centred;
          Store<M>(out + Lane(c, to.block), Load<M>(incoming + Lane(c, gradient.block)) + measured);
        });
      }
    }
  }
};

// Adds, for each channel of `from`, the sums of x - shift and of its square to `sums` [2, channels], unless that is null;
// and copies to `to`, unless it is there.
struct Epilogue {
  Extent extent;
  In from;
  const float* shift;
  Out to;
  float* sums;

  template <int N>
  INLINE void All() const {
    if (sums == nullptr) return Values<N, true, false>();
    return from.data == to.data ? Values<N, false, true>() : Values<N, true, true>();
  }

  template <int N, bool Copies, bool Sums>
  INLINE void Values() const {
    float* squares = sums + extent.channels;
    for (int64_t row = 0; row < extent.rows; ++row) {
      for (int64_t pixel = 0; pixel < extent.pixels; ++pixel) {
        const float* in = from.At(row, pixel);
        float* out = to.At(row, pixel);
        ForLanes<N>(extent.channels, [&](auto lanes, int64_t c) INLINE_LAMBDA {
          constexpr int M = lanes.value;
          const Vector<M> value = Load<M>(in + Lane(c, from.block));
          if constexpr (Sums) {
            const Vector<M> d = value - Load<M>(shift + c);
            Store<M>(sums + c, Load<M>(sums + c) + d);
            Store<M>(squares + c, Load<M>(squares + c) + d * d);
          }
          if constexpr (Copies) Store<M>(out + Lane(c, to.block), value);
        });
      }
    }
  }
};

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]. Rows of a are `a_row` apart, its columns `a_column`,
// rows of c `c_row`; b is dense. Each value is summed in the order of depth.
struct Product {
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  float* c;
  int64_t c_row, rows, columns, depth;
  bool adds;

  template <int N, int B, int R>
  INLINE void Tile(int64_t row, int64_t column) const {
    Vector<N> sums[R][B];
    float* to = c + row * c_row + column;
    const float* left = a + row * a_row;
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int j = 0; j < B; ++j) {
        if (adds) sums[r][j] = Load<N>(to + r * c_row + j * N);
        else sums[r][j] = Vector<N>{};
      }
    }
    const float* right = b + column;
    for (int64_t k = 0; k < depth; ++k, left += a_column, right += columns) {
      Vector<N> w[B];
      UNROLL for (int j = 0; j < B; ++j) w[j] = Load<N>(right + j * N);
      UNROLL for (int r = 0; r < R; ++r) {
        const float x = left[r * a_row];
        UNROLL for (int j = 0; j < B; ++j) sums[r][j] += w[j] * x;
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int j = 0; j < B; ++j) Store<N>(to + r * c_row + j * N, sums[r][j]);
    }
  }

  template <int N, int B, int R>
  INLINE void Rows(int64_t column) const {
    int64_t row = 0;
    for (; row + R <= rows; row += R) Tile<N, B, R>(row, column);
    for (; row + 2 <= rows; row += 2) Tile<N, B, 2>(row, column);
    for (; row < rows; ++row) Tile<N, B, 1>(row, column);
  }

  // B * R sums live in registers, with what they are made of.
  template <int N, int B, int R>
  INLINE void All() const {
    int64_t column = 0;
    for (; column + B * N <= columns; column += B * N) Rows<N, B, R>(column);
    if constexpr (B > 2) {
      if (column + 2 * N <= columns) Rows<N, 2, R>(column), column += 2 * N;
    }
    for (; column + N <= columns; column += N) Rows<N, 1, R>(column);
    if constexpr (N > 8) {
      if (column + 8 <= columns) Rows<8, 1, R>(column), column += 8;
    }
    if constexpr (N > 4) {
      if (column + 4 <= columns) Rows<4, 1, R>(column), column += 4;
    }
    for (; column < columns; ++column) Rows<1, 1, R>(column);
  }
};

// -------------------------------------------------------------------------------------------------------------- clones

struct Clone {
  const char* name;
  bool (*runs_here)();
  void (*reduce)(const Pixels&);
  void (*convolve)(const Strip&);
  void (*sum)(const Taps&);
  void (*enter)(const Prologue&);
  void (*leave)(const Pullback&);
  void (*total)(const Total&);
  void (*finish)(const Epilogue&);
  void (*multiply)(const Product&);
};

// Calls the function for the activation of `task`.
#define PICK(function, task)                               \
  switch ((task).activation) {                             \
    case kRelu: return function<kRelu>(task);              \
    case kRelu6: return function<kRelu6>(task);            \
    case kHardSwish: return function<kHardSwish>(task);    \
    case kSwish: return function<kSwish>(task);            \
    default: return function<kNone>(task);                 \
  }

#define CLONE(name, runs_here, attribute, lanes, vectors, rows)                                               \
  attribute void name##Reduce(const Pixels& task) { ForChannels<lanes, vectors>(task, 0, task.channels); }    \
  attribute void name##Convolve(const Strip& task) { task.All<lanes>(); }                                     \
  attribute void name##Sum(const Taps& task) { task.All<lanes>(); }                                           \
  template <int A>                                                                                            \
  attribute void name##EnterAs(const Prologue& task) {                                                        \
    task.All<lanes, A>();                                                                                     \
  }                                                                                                           \
  template <int A>                                                                                            \
  attribute void name##LeaveAs(const Pullback& task) {                                                        \
    task.All<lanes, A>();                                                                                     \
  }                                                                                                           \
  void name##Enter(const Prologue& task) { PICK(name##EnterAs, task); }                                       \
  void name##Leave(const Pullback& task) { PICK(name##LeaveAs, task); }                                       \
  attribute void name##Total(const Total& task) { task.All<lanes>(); }                                        \
  attribute void name##Finish(const Epilogue& task) { task.All<lanes>(); }                                    \
  attribute void name##Multiply(const Product& task) { task.All<lanes, vectors, rows>(); }                    \
  constexpr Clone name{#name,        [] { return static_cast<bool>(runs_here); },                             \
                       name##Reduce, name##Convolve,                                                          \
                       name##Sum,    name##Enter,                                                             \
                       name##Leave,  name##Total,                                                             \
                       name##Finish, name##Multiply}

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
  const int64_t part_pixels = std::clamp<int64_t>(kTileValues / std::max<int64_t>(channels, 1), 1, kTaskPixels);
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

// ------------------------------------------------------------------------------------------------------- convolutions

using Values = ffi::Buffer<ffi::F32, 2>;  // [N, room]: those of an image, then room for more

// Memory of this thread for `count` floats, number `which`, until the next call with that number.
float* Scratch(int which, int64_t count) {
  constexpr int64_t kAlignment = 64;
  static thread_local std::vector<float> kept[8];
  std::vector<float>& mine = kept[which];
  const int64_t wanted = count + kAlignment / sizeof(float);
  if (static_cast<int64_t>(mine.size()) < wanted) mine.resize(wanted);
  const auto address = reinterpret_cast<uintptr_t>(mine.data());
  return mine.data() + (CeilDivide(address, kAlignment) * kAlignment - address) / sizeof(float);
}

// A convolution of images [N, height, width, inputs] by weights [kh, kw, inputs, outputs], or [kh, kw, 1, inputs].
struct Layer {
  int64_t images, height, width, inputs, out_height, out_width, outputs, kernel_height, kernel_width, stride;
  enum { kDepthwise, kPointwise, kDense } kind;

  int64_t in_pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }
  int64_t taps() const { return kernel_height * kernel_width; }
};

struct Affine {
  const float *centre, *scale, *offset;
  int64_t activation;  // < 0: what is read is read as it is

  bool identity() const { return activation < 0; }
};

// What a convolution reads: images `room` apart.
struct Source {
  const float* data;
  int64_t room;
  Affine affine;
};

// Gradients. In are those of y and of its moments: constant + slope * (y - mean), unless `constant` is null. Out are
// those of what is read, null if nobody asks, and of its affine map, [2, inputs]: of offset, of scale.
struct Gradients {
  const float *gradient, *y;
  int64_t room;
  const float *constant, *slope, *mean;
  float *dx, *weights, *sums;
};

// Mean of each channel, and the sum of squared differences from it, to `to` and `to` + stride; from `sums` [2, channels]
// of differences from `shift` and of their squares, over `count` pixels.
void Centre(const float* shift, const float* sums, int64_t count, int64_t channels, float* to, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    const float mean = sums[c] / static_cast<float>(count);
    to[c] = shift[c] + mean;
    to[stride + c] = sums[channels + c] - sums[c] * mean;
  }
}

// Mean and biased variance [2, channels], from what `Centre` gives for each of several parts: Chan et al. 1983,
// "Algorithms for Computing the Sample Variance".
void MergeMoments(const std::vector<float>& parts, const std::vector<int64_t>& pixels, int64_t channels, float* to) {
  std::vector<double> mean(channels), squares(channels);
  double seen = 0;
  for (size_t part = 0; part < pixels.size(); ++part) {
    const float* of_part = parts.data() + part * 2 * channels;
    const double more = static_cast<double>(pixels[part]), share = more / (seen + more), weight = seen * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double away = of_part[c] - mean[c];
      mean[c] += away * share;
      squares[c] += of_part[channels + c] + away * away * weight;
    }
    seen += more;
  }
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = static_cast<float>(mean[c]);
    to[channels + c] = static_cast<float>(std::max(squares[c] / seen, 0.0));
  }
}

// Sums over parts of `from` [parts, size], each in the order of the parts.
void AddParts(ffi::ThreadPool& pool, const std::vector<float>& from, int64_t parts, int64_t size, float* to) {
  Parallel(pool, CeilDivide(size, kMergeValues), [&](int64_t task) {
    const int64_t begin = task * kMergeValues, end = std::min(begin + kMergeValues, size);
    std::fill(to + begin, to + end, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t k = begin; k < end; ++k) to[k] += from[part * size + k];
    }
  });
}

// What is read of `extent` pixels from channel `channel` on, to `to`.
void Read(const Extent& extent, const In& x, const Affine& affine, int64_t channel, const Out& to) {
  if (affine.identity()) return Chosen().finish({extent, x, nullptr, to, nullptr});
  Chosen().enter({extent, x, affine.centre + channel, affine.scale + channel, affine.offset + channel,
                  affine.activation, to});
}

// The gradient of the result, to `to`; `from` floats into it.
void ReadGradient(const Extent& extent, const Gradients& g, int64_t from, int64_t row, int64_t pixel, int64_t channel,
                  const Out& to) {
  const In gradient{g.gradient + from, row, pixel};
  if (g.constant == nullptr) return Chosen().finish({extent, gradient, nullptr, to, nullptr});
  Chosen().total({extent, gradient, {g.y + from, row, pixel}, g.constant + channel, g.slope + channel,
                  g.mean + channel, to});
}

// Takes the gradient of what was read to that of x, at `dx`; adds those of the affine map to `sums` [2, stride].
void PullBack(const Extent& extent, const In& gradient, const In& x, const Affine& affine, int64_t channel,
              const Out& dx, float* sums, int64_t stride) {
  if (affine.identity()) return Chosen().finish({extent, gradient, nullptr, dx, nullptr});
  float* found = Scratch(7, 2 * extent.channels);
  std::fill_n(found, 2 * extent.channels, 0.0f);
  Pullback task;
  static_cast<Prologue&>(task) = {extent, x, affine.centre + channel, affine.scale + channel,
                                  affine.offset + channel, affine.activation, dx};
  task.gradient = gradient, task.sums = found;
  Chosen().leave(task);
  for (int64_t k = 0; k < 2; ++k) {
    for (int64_t c = 0; c < extent.channels; ++c) sums[k * stride + channel + c] += found[k * extent.channels + c];
  }
}

// ---------------------------------------------------------------------------------------------------------- depthwise

// Tasks of a depthwise convolution: over groups of images, and over slices of channels. In scratch memory a slice is
// [blocks, rows, width, kLanes], with zeros around each row of an image, and for channels that there are not.
struct Slices {
  int64_t count, blocks, group, groups;

  Slices(const Layer& layer, int64_t images_at_most) {
    const int64_t all = CeilDivide(layer.inputs, kLanes), values = std::max(layer.in_pixels(), layer.out_pixels()) * kLanes;
    count = CeilDivide(all, std::max<int64_t>(kSliceValues / std::max<int64_t>(values, 1), 1));
    blocks = CeilDivide(all, std::max<int64_t>(count, 1));
    group = std::clamp<int64_t>(kTileValues / std::max<int64_t>(values * blocks, 1), 1, images_at_most);
    groups = CeilDivide(layer.images, group);
  }
};

// Zeros around the rows of a slice, and for channels that there are not.
void ZeroAround(int64_t rows, int64_t pixels, int64_t channels, int64_t begin, int64_t blocks, int64_t left,
                int64_t width, float* to) {
  const int64_t size = rows * width * kLanes, right = width - left - pixels;
  for (int64_t block = 0; block < blocks; ++block) {
    float* mine = to + block * size;
    if (channels - begin - block * kLanes < kLanes) {
      std::fill_n(mine, size, 0.0f);
    } else {
      for (int64_t row = 0; row < rows; ++row, mine += width * kLanes) {
        std::fill_n(mine, left * kLanes, 0.0f);
        std::fill_n(mine + (left + pixels) * kLanes, right * kLanes, 0.0f);
      }
    }
  }
}

// The kernels [taps, channels] of a slice: [blocks, taps, kLanes].
void FillKernel(const float* weights, int64_t taps, int64_t channels, int64_t begin, int64_t blocks, float* to) {
  std::fill_n(to, blocks * taps * kLanes, 0.0f);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t channel = begin + block * kLanes, some = std::min(kLanes, channels - channel);
    for (int64_t tap = 0; tap < taps && some > 0; ++tap) {
      std::copy_n(weights + tap * channels + channel, some, to + (block * taps + tap) * kLanes);
    }
  }
}

void DepthwiseForward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights, float* y,
                      int64_t room, float* moments) {
  const int64_t channels = layer.inputs, taps = layer.taps();
  const Slices slices(layer, kParts);
  const Axis rows = Forwards(layer.height, layer.kernel_height, layer.stride);
  const Columns columns = ColumnsForwards(layer.width, layer.kernel_width, layer.stride);
  const int64_t in_size = layer.height * columns.width * kLanes, out_size = layer.out_pixels() * kLanes;
  std::vector<float> parts(moments == nullptr ? 0 : slices.groups * 2 * channels);
  std::vector<int64_t> counts(slices.groups);
  Parallel(pool, slices.groups * slices.count, [&](int64_t task) {
    const int64_t group = task / slices.count, first = group * slices.group;
    const int64_t last = std::min(first + slices.group, layer.images);
    const int64_t blocks = slices.blocks, begin = task % slices.count * blocks * kLanes;
    const int64_t width = std::min(channels - begin, blocks * kLanes);
    float* kernel = Scratch(0, blocks * taps * kLanes);
    float* in = Scratch(1, blocks * in_size);
    float* out = Scratch(2, blocks * out_size);
    float* sums = Scratch(3, 3 * blocks * kLanes);  // and the shift
    float* shift = sums + 2 * width;
    FillKernel(weights, taps, channels, begin, blocks, kernel);
    ZeroAround(layer.height, layer.width, channels, begin, blocks, columns.left, columns.width, in);
    std::fill_n(sums, 2 * width, 0.0f);
    for (int64_t image = first; image < last; ++image) {
      Read({layer.height, layer.width, width}, {x.data + image * x.room + begin, layer.width * channels, channels},
           x.affine, begin, {in + columns.left * kLanes, columns.width * kLanes, kLanes, in_size});
      for (int64_t block = 0; block * kLanes < width; ++block) {
        float* mine = out + block * out_size;
        Chosen().convolve({rows, columns, in + block * in_size, kernel + block * taps * kLanes, layer.kernel_width,
                           mine, layer.out_width});
        if (image == first) std::copy_n(mine, std::min(kLanes, width - block * kLanes), shift + block * kLanes);
      }
      Chosen().finish({{1, layer.out_pixels(), width}, {out, 0, kLanes, out_size}, shift,
                       {y + image * room + begin, 0, channels}, moments == nullptr ? nullptr : sums});
    }
    if (moments == nullptr) return;
    counts[group] = (last - first) * layer.out_pixels();
    Centre(shift, sums, counts[group], width, parts.data() + group * 2 * channels + begin, channels);
  });
  if (moments != nullptr) MergeMoments(parts, counts, channels, moments);
}

void DepthwiseBackward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights,
                       const Gradients& g) {
  const int64_t channels = layer.inputs, taps = layer.taps(), size = taps * channels;
  const Slices slices(layer, 1);
  const int64_t part_images = std::max<int64_t>(CeilDivide(layer.images, kParts), 1);
  const int64_t parts = CeilDivide(layer.images, part_images);
  const Axis rows = Backwards(layer.height, layer.kernel_height, layer.stride);
  const Columns there = ColumnsForwards(layer.width, layer.kernel_width, layer.stride);
  const Columns back = ColumnsBackwards(layer.width, layer.kernel_width, layer.stride);
  const int64_t in_size = layer.height * there.width * kLanes, out_size = layer.out_height * back.width * kLanes;
  const int64_t dx_size = layer.in_pixels() * kLanes;
  std::vector<float> of_weights(g.weights == nullptr ? 0 : parts * size), of_sums(parts * 2 * channels);
  Parallel(pool, parts * slices.count, [&](int64_t task) {
    const int64_t part = task / slices.count, first = part * part_images;
    const int64_t last = std::min(first + part_images, layer.images);
    const int64_t blocks = slices.blocks, begin = task % slices.count * blocks * kLanes;
    const int64_t width = std::min(channels - begin, blocks * kLanes);
    float* kernel = Scratch(0, blocks * taps * kLanes);
    float* in = Scratch(1, blocks * in_size);
    float* total = Scratch(2, blocks * out_size);
    float* pulled = Scratch(3, blocks * dx_size);
    float* sums = Scratch(4, blocks * taps * kLanes);
    std::fill_n(sums, blocks * taps * kLanes, 0.0f);
    if (g.dx != nullptr) FillKernel(weights, taps, channels, begin, blocks, kernel);
    ZeroAround(layer.height, layer.width, channels, begin, blocks, there.left, there.width, in);
    ZeroAround(layer.out_height, layer.out_width, channels, begin, blocks, back.left, back.width, total);
    for (int64_t image = first; image < last; ++image) {
      const In from{x.data + image * x.room + begin, layer.width * channels, channels};
      if (g.weights != nullptr) {
        Read({layer.height, layer.width, width}, from, x.affine, begin,
             {in + there.left * kLanes, there.width * kLanes, kLanes, in_size});
      }
      ReadGradient({layer.out_height, layer.out_width, width}, g, image * g.room + begin, layer.out_width * channels,
                   channels, begin, {total + back.left * kLanes, back.width * kLanes, kLanes, out_size});
      for (int64_t block = 0; block * kLanes < width; ++block) {
        const float* gradient = total + block * out_size;
        if (g.weights != nullptr) {
          Chosen().sum({layer.kernel_height, layer.kernel_width, layer.stride,
                        Padding(layer.height, layer.kernel_height, layer.stride), in + block * in_size, layer.height,
                        there.width, gradient + back.left * kLanes, layer.out_height, layer.out_width, back.width,
                        sums + block * taps * kLanes});
        }
        if (g.dx == nullptr) continue;
        Chosen().convolve({rows, back, gradient, kernel + block * taps * kLanes, layer.kernel_width,
                           pulled + block * dx_size, layer.width});
      }
      if (g.dx == nullptr) continue;
      PullBack({layer.height, layer.width, width}, {pulled, layer.width * kLanes, kLanes, dx_size}, from, x.affine,
               begin, {g.dx + image * x.room + begin, layer.width * channels, channels},
               of_sums.data() + part * 2 * channels, channels);
    }
    if (g.weights == nullptr) return;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < width; ++c) {
        of_weights[part * size + tap * channels + begin + c] = sums[(c / kLanes * taps + tap) * kLanes + c % kLanes];
      }
    }
  });
  if (g.weights != nullptr) AddParts(pool, of_weights, parts, size, g.weights);
  if (g.sums != nullptr) AddParts(pool, of_sums, parts, 2 * channels, g.sums);
}

// ---------------------------------------------------------------------------------------------------------- pointwise

// Pixels that a task of a 1x1 convolution holds at a time.
int64_t TilePixels(const Layer& layer) {
  return std::max<int64_t>(kTileValues / std::max(layer.inputs, layer.outputs), 8);
}

// Pixels [begin, end) of images [N, pixels, channels] that are `room` apart.
struct Run {
  int64_t pixels, channels, room, begin, end;

  int64_t At(int64_t pixel) const { return pixel / pixels * room + pixel % pixels * channels; }
  bool together() const { return pixels * channels == room || begin / pixels == (end - 1) / pixels; }

  // Calls `work(extent, float of the first image, float of the run)` for each stretch of memory.
  template <typename Work>
  void For(const Work& work) const {
    if (together()) return work(Extent{1, end - begin, channels}, At(begin), 0);
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t stop = std::min(end, (pixel / pixels + 1) * pixels);
      work(Extent{1, stop - pixel, channels}, At(pixel), (pixel - begin) * channels);
      pixel = stop;
    }
  }
};

// What is read of a run of pixels: where it lies, or in scratch memory.
const float* ReadRun(const Source& x, const Run& run) {
  if (x.affine.identity() && run.together()) return x.data + run.At(run.begin);
  float* to = Scratch(0, (run.end - run.begin) * run.channels);
  run.For([&](const Extent& extent, int64_t at, int64_t done) {
    Read(extent, {x.data + at, 0, run.channels}, x.affine, 0, {to + done, 0, run.channels});
  });
  return to;
}

void PointwiseForward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights, float* y,
                      int64_t room, float* moments) {
  const int64_t inputs = layer.inputs, outputs = layer.outputs, pixels = layer.images * layer.in_pixels();
  const int64_t tile = TilePixels(layer), tiles = CeilDivide(pixels, tile);
  std::vector<float> parts(moments == nullptr ? 0 : tiles * 2 * outputs);
  std::vector<int64_t> counts(tiles);
  Parallel(pool, tiles, [&](int64_t task) {
    const int64_t begin = task * tile, end = std::min(begin + tile, pixels);
    const Run run{layer.in_pixels(), outputs, room, begin, end};
    const float* from = ReadRun(x, {layer.in_pixels(), inputs, x.room, begin, end});
    float* to = run.together() ? y + run.At(begin) : Scratch(1, (end - begin) * outputs);
    Chosen().multiply({from, inputs, 1, weights, to, outputs, end - begin, outputs, inputs, false});
    if (!run.together()) {
      run.For([&](const Extent& extent, int64_t at, int64_t done) {
        std::copy_n(to + done, extent.pixels * outputs, y + at);
      });
    }
    if (moments == nullptr) return;
    counts[task] = end - begin;
    float* sums = Scratch(2, 2 * outputs);
    std::fill_n(sums, 2 * outputs, 0.0f);
    Chosen().finish({{1, end - begin, outputs}, {to, 0, outputs}, to, {to, 0, outputs}, sums});
    Centre(to, sums, counts[task], outputs, parts.data() + task * 2 * outputs, outputs);
  });
  if (moments != nullptr) MergeMoments(parts, counts, outputs, moments);
}

void PointwiseBackward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights,
                       const Gradients& g) {
  const int64_t inputs = layer.inputs, outputs = layer.outputs, size = inputs * outputs;
  const int64_t pixels = layer.images * layer.in_pixels(), tile = TilePixels(layer);
  const int64_t part_pixels = std::max<int64_t>(CeilDivide(pixels, kParts), 1), parts = CeilDivide(pixels, part_pixels);
  std::vector<float> transposed(size), of_weights(parts * size), of_sums(parts * 2 * inputs);
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t o = 0; o < outputs; ++o) transposed[o * inputs + i] = weights[i * outputs + o];
  }
  Parallel(pool, parts, [&](int64_t part) {
    const int64_t stop = std::min((part + 1) * part_pixels, pixels);
    for (int64_t begin = part * part_pixels; begin < stop; begin += tile) {
      const int64_t end = std::min(begin + tile, stop), count = end - begin;
      const Run ours{layer.in_pixels(), inputs, x.room, begin, end};
      const Run theirs{layer.in_pixels(), outputs, g.room, begin, end};
      const float* total = g.gradient + theirs.At(begin);
      if (g.constant != nullptr || !theirs.together()) {
        float* to = Scratch(1, count * outputs);
        theirs.For([&](const Extent& extent, int64_t at, int64_t done) {
          ReadGradient(extent, g, at, 0, outputs, 0, {to + done, 0, outputs});
        });
        total = to;
      }
      Chosen().multiply({ReadRun(x, ours), 1, inputs, total, of_weights.data() + part * size, outputs, inputs, outputs,
                         count, true});
      const bool in_place = x.affine.identity() && ours.together();
      float* to = in_place ? g.dx + ours.At(begin) : Scratch(2, count * inputs);
      Chosen().multiply({total, outputs, 1, transposed.data(), to, inputs, count, inputs, outputs, false});
      if (in_place) continue;
      ours.For([&](const Extent& extent, int64_t at, int64_t done) {
        PullBack(extent, {to + done, 0, inputs}, {x.data + at, 0, inputs}, x.affine, 0, {g.dx + at, 0, inputs},
                 of_sums.data() + part * 2 * inputs, inputs);
      });
    }
  });
  AddParts(pool, of_weights, parts, size, g.weights);
  AddParts(pool, of_sums, parts, 2 * inputs, g.sums);
}

// -------------------------------------------------------------------------------------------------------------- dense

// Any other convolution. A row of its outputs is, for each row of the kernel, the product of a matrix whose rows overlap
// (the pixels that an output meets lie together) and that row's weights.
void DenseForward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights, float* y,
                  int64_t room, float* moments) {
  const int64_t inputs = layer.inputs, outputs = layer.outputs, depth = layer.kernel_width * inputs;
  const Axis rows = Forwards(layer.height, layer.kernel_height, layer.stride);
  const Columns columns = ColumnsForwards(layer.width, layer.kernel_width, layer.stride);
  const int64_t row_size = columns.width * inputs;
  std::vector<float> parts(moments == nullptr ? 0 : layer.images * 2 * outputs);
  Parallel(pool, layer.images, [&](int64_t image) {
    float* in = Scratch(1, layer.height * row_size);
    std::fill_n(in, layer.height * row_size, 0.0f);
    Read({layer.height, layer.width, inputs}, {x.data + image * x.room, layer.width * inputs, inputs}, x.affine, 0,
         {in + columns.left * inputs, row_size, inputs});
    float* to = y + image * room;
    for (int64_t row = 0; row < layer.out_height; ++row) {
      const Reach down = rows.outputs[row];
      float* mine = to + row * layer.out_width * outputs;
      if (down.count == 0) std::fill_n(mine, layer.out_width * outputs, 0.0f);
      for (int64_t i = 0; i < down.count; ++i) {
        Chosen().multiply({in + (down.input + i) * row_size, layer.stride * inputs, 1,
                           weights + (down.tap + i) * depth * outputs, mine, outputs, layer.out_width, outputs, depth,
                           i > 0});
      }
    }
    if (moments == nullptr) return;
    float* sums = Scratch(2, 2 * outputs);
    std::fill_n(sums, 2 * outputs, 0.0f);
    Chosen().finish({{1, layer.out_pixels(), outputs}, {to, 0, outputs}, to, {to, 0, outputs}, sums});
    Centre(to, sums, layer.out_pixels(), outputs, parts.data() + image * 2 * outputs, outputs);
  });
  if (moments == nullptr) return;
  MergeMoments(parts, std::vector<int64_t>(layer.images, layer.out_pixels()), outputs, moments);
}

void DenseBackward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights,
                   const Gradients& g) {
  const int64_t inputs = layer.inputs, outputs = layer.outputs, depth = layer.kernel_width * inputs;
  const int64_t taps = layer.taps(), size = taps * inputs * outputs;
  const Axis rows = Forwards(layer.height, layer.kernel_height, layer.stride);
  const Columns columns = ColumnsForwards(layer.width, layer.kernel_width, layer.stride);
  const int64_t row_size = columns.width * inputs, part_images = std::max<int64_t>(CeilDivide(layer.images, kParts), 1);
  const int64_t parts = CeilDivide(layer.images, part_images);
  std::vector<float> transposed(g.dx == nullptr ? 0 : size);  // [taps, outputs, inputs]
  for (int64_t k = 0; k < static_cast<int64_t>(transposed.size()); ++k) {
    const int64_t tap = k / (inputs * outputs), output = k / inputs % outputs, input = k % inputs;
    transposed[k] = weights[(tap * inputs + input) * outputs + output];
  }
  std::vector<float> of_weights(g.weights == nullptr ? 0 : parts * size), of_sums(parts * 2 * inputs);
  Parallel(pool, parts, [&](int64_t part) {
    const int64_t stop = std::min((part + 1) * part_images, layer.images);
    for (int64_t image = part * part_images; image < stop; ++image) {
      const In from{x.data + image * x.room, layer.width * inputs, inputs};
      const Extent extent{layer.height, layer.width, inputs};
      float* total = Scratch(0, layer.out_pixels() * outputs);
      float* in = Scratch(1, layer.height * row_size);
      ReadGradient({1, layer.out_pixels(), outputs}, g, image * g.room, 0, outputs, 0, {total, 0, outputs});
      std::fill_n(in, layer.height * row_size, 0.0f);
      if (g.weights != nullptr) {
        Read(extent, from, x.affine, 0, {in + columns.left * inputs, row_size, inputs});
        for (int64_t row = 0; row < layer.out_height; ++row) {
          const Reach down = rows.outputs[row];
          for (int64_t i = 0; i < down.count; ++i) {
            Chosen().multiply({in + (down.input + i) * row_size, 1, layer.stride * inputs,
                               total + row * layer.out_width * outputs,
                               of_weights.data() + part * size + (down.tap + i) * depth * outputs, outputs, depth,
                               outputs, layer.out_width, true});
          }
        }
      }
      if (g.dx == nullptr) continue;
      std::fill_n(in, layer.height * row_size, 0.0f);
      for (int64_t row = 0; row < layer.out_height; ++row) {
        const Reach down = rows.outputs[row];
        for (int64_t tap = 0; tap < down.count * layer.kernel_width; ++tap) {
          const int64_t i = tap / layer.kernel_width, j = tap % layer.kernel_width;
          Chosen().multiply({total + row * layer.out_width * outputs, outputs, 1,
                             transposed.data() + (down.tap * layer.kernel_width + tap) * inputs * outputs,
                             in + (down.input + i) * row_size + j * inputs, layer.stride * inputs, layer.out_width,
                             inputs, outputs, true});
        }
      }
      PullBack(extent, {in + columns.left * inputs, row_size, inputs}, from, x.affine, 0,
               {g.dx + image * x.room, layer.width * inputs, inputs}, of_sums.data() + part * 2 * inputs, inputs);
    }
  });
  if (g.weights != nullptr) AddParts(pool, of_weights, parts, size, g.weights);
  if (g.sums != nullptr) AddParts(pool, of_sums, parts, 2 * inputs, g.sums);
}

// --------------------------------------------------------------------------------------------------------- bottleneck

constexpr int64_t kProjectedPixels = 96;  // of several images, that a task projects together at least

// 1x1 convolution, depthwise convolution, and 1x1 convolution unless `project` is null, with what is before each of them.
// Nothing between them leaves the cache: each image goes through all three, its wide rows as they are made.
struct Bottleneck {
  Layer expand, depthwise;
  Affine first, second, third;
  const float *expand_weights, *depthwise_weights, *project_weights;
  int64_t outputs;

  void Run(ffi::ThreadPool& pool, const float* x, float* y) const {
    const int64_t wide = expand.outputs, taps = depthwise.taps(), blocks = CeilDivide(wide, kLanes);
    const Axis rows = Forwards(depthwise.height, depthwise.kernel_height, depthwise.stride);
    const Columns columns = ColumnsForwards(depthwise.width, depthwise.kernel_width, depthwise.stride);
    const int64_t in_size = depthwise.height * columns.width * kLanes, out_pixels = depthwise.out_pixels();
    const int64_t group = std::clamp<int64_t>(kProjectedPixels / std::max<int64_t>(out_pixels, 1), 1, 8);
    const int64_t band = std::clamp<int64_t>(TilePixels(expand) / expand.width, 1, expand.height);
    std::vector<float> kernel(blocks * taps * kLanes);
    FillKernel(depthwise_weights, taps, wide, 0, blocks, kernel.data());
    Parallel(pool, CeilDivide(expand.images, group), [&](int64_t task) {
      const int64_t begin = task * group, images = std::min(group, expand.images - begin);
      float* in = Scratch(3, blocks * in_size);
      float* out = Scratch(4, blocks * out_pixels * kLanes);
      float* read = project_weights == nullptr ? nullptr : Scratch(5, images * out_pixels * wide);
      ZeroAround(depthwise.height, depthwise.width, wide, 0, blocks, columns.left, columns.width, in);
      for (int64_t image = begin; image < begin + images; ++image) {
        for (int64_t row = 0; row < expand.height; row += band) {
          const int64_t some = std::min(band, expand.height - row), pixels = some * expand.width;
          const int64_t place = image * expand.in_pixels() + row * expand.width;
          const Source source{x, expand.in_pixels() * expand.inputs, first};
          const float* from = ReadRun(source, {expand.in_pixels(), expand.inputs, source.room, place, place + pixels});
          float* tile = Scratch(1, pixels * wide);
          Chosen().multiply({from, expand.inputs, 1, expand_weights, tile, wide, pixels, wide, expand.inputs, false});
          Read({some, expand.width, wide}, {tile, expand.width * wide, wide}, second, 0,
               {in + (row * columns.width + columns.left) * kLanes, columns.width * kLanes, kLanes, in_size});
        }
        for (int64_t block = 0; block < blocks; ++block) {
          Chosen().convolve({rows, columns, in + block * in_size, kernel.data() + block * taps * kLanes,
                             depthwise.kernel_width, out + block * out_pixels * kLanes, depthwise.out_width});
        }
        const Extent extent{1, out_pixels, wide};
        const In made{out, 0, kLanes, out_pixels * kLanes};
        if (read == nullptr) {
          Chosen().finish({extent, made, nullptr, {y + image * out_pixels * wide, 0, wide}, nullptr});
        } else {
          Read(extent, made, third, 0, {read + (image - begin) * out_pixels * wide, 0, wide});
        }
      }
      if (read == nullptr) return;
      Chosen().multiply({read, wide, 1, project_weights, y + begin * out_pixels * outputs, outputs, images * out_pixels,
                         outputs, wide, false});
    });
  }
};

// ----------------------------------------------------------------------------------------------- handlers: convolutions

// Whether `image` [N, H, W, C] and `weights` [kh, kw, 1, C] give `outputs` [N, ceil(H / stride), ceil(W / stride), C].
template <typename Image, typename Weights, typename Outputs>
ffi::Error Check(const Image& image, const Weights& weights, const Outputs& outputs, int64_t stride) {
  const auto x = image.dimensions(), w = weights.dimensions(), y = outputs.dimensions();
  const bool fits = stride > 0 && w[2] == 1 && x[3] == w[3] && x[3] == y[3] && x[0] == y[0] &&
                    y[1] == CeilDivide(x[1], stride) && y[2] == CeilDivide(x[2], stride);
  return fits ? ffi::Error::Success() : ffi::Error::InvalidArgument("depthwise: shapes that do not fit together");
}

template <typename Image, typename Weights>
Layer Depthwise(const Image& image, const Weights& weights, int64_t stride) {
  const auto x = image.dimensions(), w = weights.dimensions();
  return {x[0], x[1], x[2], x[3], CeilDivide(x[1], stride), CeilDivide(x[2], stride), x[3], w[0], w[1], stride, Layer::kDepthwise};
}

constexpr Affine kAsItIs{nullptr, nullptr, nullptr, -1};

ffi::Error Forward(ffi::ThreadPool pool, Tensor x, Tensor w, Result y, int64_t stride) {
  if (ffi::Error error = Check(x, w, *y, stride); error.failure()) return error;
  const Layer layer = Depthwise(x, w, stride);
  DepthwiseForward(pool, layer, {x.typed_data(), layer.in_pixels() * layer.inputs, kAsItIs}, w.typed_data(),
                   y->typed_data(), layer.out_pixels() * layer.inputs, nullptr);
  return ffi::Error::Success();
}

ffi::Error InputGradient(ffi::ThreadPool pool, Tensor g, Tensor w, Result dx, int64_t stride) {
  if (ffi::Error error = Check(*dx, w, g, stride); error.failure()) return error;
  const Layer layer = Depthwise(*dx, w, stride);
  Gradients gradients{};
  gradients.gradient = g.typed_data(), gradients.room = layer.out_pixels() * layer.inputs;
  gradients.dx = dx->typed_data();
  DepthwiseBackward(pool, layer, {nullptr, layer.in_pixels() * layer.inputs, kAsItIs}, w.typed_data(), gradients);
  return ffi::Error::Success();
}

ffi::Error WeightGradient(ffi::ThreadPool pool, Tensor x, Tensor g, Result dw, int64_t stride) {
  if (ffi::Error error = Check(x, *dw, g, stride); error.failure()) return error;
  const Layer layer = Depthwise(x, *dw, stride);
  Gradients gradients{};
  gradients.gradient = g.typed_data(), gradients.room = layer.out_pixels() * layer.inputs;
  gradients.weights = dw->typed_data();
  DepthwiseBackward(pool, layer, {x.typed_data(), layer.in_pixels() * layer.inputs, kAsItIs}, nullptr, gradients);
  return ffi::Error::Success();
}

// The layer that operands of these shapes are of; an error where they are of none.
ffi::ErrorOr<Layer> LayerOf(const Values& x, const Tensor& w, const Channels& scale, int64_t y_images, int64_t y_room,
                            int64_t height, int64_t width, int64_t stride) {
  const auto kernel = w.dimensions(), images = x.dimensions();
  const int64_t inputs = scale.element_count(), outputs = kernel[3];
  const bool pointwise = kernel[0] * kernel[1] * stride == 1 && kernel[2] == inputs;
  const bool depthwise = !pointwise && kernel[2] == 1 && inputs == outputs;
  if (stride < 1 || !(pointwise || depthwise || kernel[2] == inputs)) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("fused convolution: neither depthwise nor of all channels"));
  }
  const Layer layer{images[0], height, width, inputs, CeilDivide(height, stride), CeilDivide(width, stride), outputs,
                    kernel[0], kernel[1], stride,
                    pointwise ? Layer::kPointwise : depthwise ? Layer::kDepthwise : Layer::kDense};
  const bool fits = y_images == images[0] && images[1] >= layer.in_pixels() * inputs &&
                    y_room >= layer.out_pixels() * outputs;
  if (fits) return layer;
  return ffi::Unexpected(ffi::Error::InvalidArgument("fused convolution: shapes that do not fit together"));
}

ffi::Error FusedForward(ffi::ThreadPool pool, Values x, Tensor w, Channels centre, Channels scale, Channels offset,
                        ffi::Result<Values> y, ffi::Result<Sums> moments, int64_t height, int64_t width,
                        int64_t stride, int64_t activation, int64_t measures) {
  const auto layer = LayerOf(x, w, scale, y->dimensions()[0], y->dimensions()[1], height, width, stride);
  if (layer.has_error()) return layer.error();
  const Source from{x.typed_data(), x.dimensions()[1],
                    {centre.typed_data(), scale.typed_data(), offset.typed_data(), activation}};
  constexpr decltype(&DenseForward) kForward[] = {DepthwiseForward, PointwiseForward, DenseForward};
  kForward[layer->kind](pool, *layer, from, w.typed_data(), y->typed_data(), y->dimensions()[1],
          measures ? moments->typed_data() : nullptr);
  if (!measures) std::fill_n(moments->typed_data(), moments->element_count(), 0.0f);
  return ffi::Error::Success();
}

enum Wanted : int64_t { kBoth, kOperand, kWeights };  // of a dense convolution: others give both

ffi::Error FusedBackward(ffi::ThreadPool pool, Values gradient, Values y, Channels constant, Channels slope,
                         Channels mean, Values x, Tensor w, Channels centre, Channels scale, Channels offset,
                         ffi::Result<Values> dx, ffi::Result<Tensor> dw, ffi::Result<Sums> sums, int64_t height,
                         int64_t width, int64_t stride, int64_t activation, int64_t measures, int64_t wanted) {
  const auto layer = LayerOf(x, w, scale, y.dimensions()[0], y.dimensions()[1], height, width, stride);
  if (layer.has_error()) return layer.error();
  const Source from{x.typed_data(), x.dimensions()[1],
                    {centre.typed_data(), scale.typed_data(), offset.typed_data(), activation}};
  Gradients gradients{gradient.typed_data(), y.typed_data(),    y.dimensions()[1],
                            measures ? constant.typed_data() : nullptr, slope.typed_data(), mean.typed_data(),
                            dx->typed_data(),      dw->typed_data(),  sums->typed_data()};
  if (wanted == kOperand) gradients.weights = nullptr;
  if (wanted == kWeights) gradients.dx = gradients.sums = nullptr;
  constexpr decltype(&DenseBackward) kBackward[] = {DepthwiseBackward, PointwiseBackward, DenseBackward};
  kBackward[layer->kind](pool, *layer, from, w.typed_data(), gradients);
  return ffi::Error::Success();
}

// `activations` are those before each convolution; the last is < -1 where there is no projection, whose operands are then
// of any value.
ffi::Error RunBottleneck(ffi::ThreadPool pool, Values x, Channels centre, Channels scale, Channels offset, Tensor expand,
                         Channels centre_2, Channels scale_2, Channels offset_2, Tensor depthwise, Channels centre_3,
                         Channels scale_3, Channels offset_3, Tensor project, ffi::Result<Values> y, int64_t height,
                         int64_t width, int64_t stride, ffi::Span<const int64_t> activations) {
  const auto images = x.dimensions(), e = expand.dimensions(), d = depthwise.dimensions(), p = project.dimensions();
  const bool projects = activations[2] >= -1;
  const int64_t out_height = CeilDivide(height, stride), out_width = CeilDivide(width, stride), wide = e[3];
  const int64_t outputs = projects ? p[3] : wide;
  const bool fits = e[0] * e[1] == 1 && d[2] == 1 && d[3] == wide && images[1] == height * width * e[2] &&
                    y->dimensions()[0] == images[0] && y->dimensions()[1] == out_height * out_width * outputs &&
                    (!projects || (p[0] * p[1] == 1 && p[2] == wide));
  if (!fits) return ffi::Error::InvalidArgument("bottleneck: shapes that do not fit together");
  const Bottleneck bottleneck{
      {images[0], height, width, e[2], height, width, wide, 1, 1, 1, Layer::kPointwise},
      {images[0], height, width, wide, out_height, out_width, wide, d[0], d[1], stride, Layer::kDepthwise},
      {centre.typed_data(), scale.typed_data(), offset.typed_data(), activations[0]},
      {centre_2.typed_data(), scale_2.typed_data(), offset_2.typed_data(), activations[1]},
      {centre_3.typed_data(), scale_3.typed_data(), offset_3.typed_data(), activations[2]},
      expand.typed_data(),
      depthwise.typed_data(),
      projects ? project.typed_data() : nullptr,
      outputs};
  bottleneck.Run(pool, x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error Blank(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace

#define BINDING \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>().Ret<Tensor>().Attr<int64_t>("stride")
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_depthwise_forward, Forward, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_depthwise_input_gradient, InputGradient, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_depthwise_weight_gradient, WeightGradient, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_channel_sums, ChannelSums,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>()
                                  .Arg<Channels>().Arg<Channels>().Ret<Sums>());

#define FUSED(binding)                                                                       \
  (binding).Attr<int64_t>("height").Attr<int64_t>("width").Attr<int64_t>("stride")           \
      .Attr<int64_t>("activation").Attr<int64_t>("measures")
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_fused_forward, FusedForward,
                              FUSED(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Tensor>().Arg<Channels>()
                                        .Arg<Channels>().Arg<Channels>().Ret<Values>().Ret<Sums>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_fused_backward, FusedBackward,
                              FUSED(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Values>().Arg<Channels>()
                                        .Arg<Channels>().Arg<Channels>().Arg<Values>().Arg<Tensor>().Arg<Channels>()
                                        .Arg<Channels>().Arg<Channels>().Ret<Values>().Ret<Tensor>().Ret<Sums>())
                                  .Attr<int64_t>("wanted"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    nas_bottleneck, RunBottleneck,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Channels>().Arg<Channels>().Arg<Channels>().Arg<Tensor>()
        .Arg<Channels>().Arg<Channels>().Arg<Channels>().Arg<Tensor>().Arg<Channels>().Arg<Channels>().Arg<Channels>()
        .Arg<Tensor>().Ret<Values>().Attr<int64_t>("height").Attr<int64_t>("width").Attr<int64_t>("stride")
        .Attr<ffi::Span<const int64_t>>("activations"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_blank, Blank, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

// What __init__.py asks: the hash of the source that this was compiled from, and the clone that is in use.
extern "C" const char* nas_native_source() { return NAS_SOURCE; }
extern "C" const char* nas_native_instructions() { return Chosen().name; }
