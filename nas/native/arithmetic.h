// The innermost loops: convolutions, products, and what is between them. Each is compiled once for every clone.

#ifndef NAS_NATIVE_ARITHMETIC_H_
#define NAS_NATIVE_ARITHMETIC_H_

#include <algorithm>
#include <cstdint>

#include "geometry.h"
#include "vectors.h"

namespace {

constexpr int64_t kLanes = 16;  // channels that a depthwise convolution computes together: a line of cache

// Where channel c of a pixel lies: a block may be anywhere.
INLINE int64_t Lane(int64_t c, int64_t block) { return c / kLanes * block + c % kLanes; }

// A norm and an activation: act((x - centre) * scale + offset).
struct Affine {
  const float *centre, *scale, *offset;
  int64_t activation;  // < 0: x as it is

  bool identity() const { return activation < 0; }
  Affine From(int64_t channel) const {
    return identity() ? *this : Affine{centre + channel, scale + channel, offset + channel, activation};
  }
};

// What is done to results before they are written: either nothing; or their moments are taken, which is to add the sums
// of x - shift and of its square to `sums` and `squares`; or a norm and an activation; or a norm and a sum with a shortcut.
struct Ending {
  Affine affine{nullptr, nullptr, nullptr, -1};
  const float* shortcut = nullptr;  // laid out as the result
  const float* shift = nullptr;
  float *sums = nullptr, *squares = nullptr;

  bool identity() const { return affine.identity() && sums == nullptr; }

  // From a channel on; its shortcut `at` floats on.
  Ending From(int64_t channel, int64_t at = 0) const {
    const auto on = [](auto* start, int64_t by) { return start == nullptr ? nullptr : start + by; };
    return {affine.From(channel), on(shortcut, at), on(shift, channel), on(sums, channel), on(squares, channel)};
  }

  // Which of the functions it is: an activation after a norm, or one of these.
  enum : int64_t { kNothing = -1, kMoments = -2, kSum = -3 };
  int64_t how() const { return sums != nullptr ? kMoments : shortcut != nullptr ? kSum : affine.activation; }

  // For R values of N channels from `channel` on, in place; `added(row)` is where their shortcuts lie.
  template <int How, int N, int R, typename Added>
  INLINE void Apply(int64_t channel, Vector<N> (&values)[R], const Added& added) const {
    if constexpr (How == kMoments) {
      const Vector<N> from = Load<N>(shift + channel);
      Vector<N> sum{}, square{};
      UNROLL for (int r = 0; r < R; ++r) {
        const Vector<N> away = values[r] - from;
        sum += away, square += away * away;
      }
      Store<N>(sums + channel, Load<N>(sums + channel) + sum);
      Store<N>(squares + channel, Load<N>(squares + channel) + square);
    } else if constexpr (How != kNothing) {
      const Vector<N> centre = Load<N>(affine.centre + channel), scale = Load<N>(affine.scale + channel);
      const Vector<N> offset = Load<N>(affine.offset + channel);
      UNROLL for (int r = 0; r < R; ++r) {
        const Vector<N> normed = (values[r] - centre) * scale + offset;
        if constexpr (How == kSum) values[r] = Load<N>(added(r)) + normed;
        else values[r] = Activate<How, N>(normed);
      }
    }
  }
};

// A depthwise convolution of kLanes channels of one image.
struct Strip {
  const Axis& rows;
  const Columns& columns;
  const float* in;      // [rows.inputs, columns.width, kLanes], zeros around each row
  const float* kernel;  // [kh, kw, kLanes]
  int64_t kernel_width;
  float* out;  // [rows.size(), out_width, kLanes], pixels `out_pixel` apart
  int64_t out_width, out_pixel = kLanes;
  Ending ending{};  // without a shortcut
  int64_t begin = 0, end = rows.size();  // of output rows

  template <int How, int N>
  INLINE void All() const {
    for (int64_t y = begin; y < end; ++y) {
      for (const Phase& phase : columns.phases) {
        if (phase.stride == 1 && phase.taps == 3) Row<How, N, 1, 3>(phase, y);
        else if (phase.stride == 1 && phase.taps == 5) Row<How, N, 1, 5>(phase, y);
        else if (phase.stride == 1 && phase.taps == 7) Row<How, N, 1, 7>(phase, y);
        else if (phase.stride == 2 && phase.taps == 3) Row<How, N, 2, 3>(phase, y);
        else if (phase.stride == 2 && phase.taps == 5) Row<How, N, 2, 5>(phase, y);
        else if (phase.stride == 2 && phase.taps == 7) Row<How, N, 2, 7>(phase, y);
        else Row<How, N, 0, 0>(phase, y);
      }
    }
  }

  // Of stride S and K taps; 0: any.
  template <int How, int N, int S, int K>
  INLINE void Row(const Phase& phase, int64_t y) const {
    constexpr int X = N == 16 && S != 2 ? 8 : 4;  // what they meet lives in registers, with their sums
    int64_t n = 0;
    for (; n + X <= phase.count; n += X) Outputs<How, N, S, K, X>(phase, y, n);
    if constexpr (X > 4) {
      if (n + 4 <= phase.count) Outputs<How, N, S, K, 4>(phase, y, n), n += 4;
    }
    for (; n < phase.count; ++n) Outputs<How, N, S, K, 1>(phase, y, n);
  }

  template <int How, int N, int S, int K, int X>
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
      ending.Apply<How, N>(lane, sums, [](int) -> const float* { return nullptr; });
      float* to = out + (y * out_width + phase.first + n * phase.step) * out_pixel + lane;
      UNROLL for (int x = 0; x < X; ++x) Store<N>(to + x * phase.step * out_pixel, sums[x]);
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

// Values `from`, to `to`.
struct Copy {
  Extent extent;
  In from;
  Out to;

  template <int N>
  INLINE void All() const {
    for (int64_t row = 0; row < extent.rows; ++row) {
      for (int64_t pixel = 0; pixel < extent.pixels; ++pixel) {
        const float* in = from.At(row, pixel);
        float* out = to.At(row, pixel);
        ForLanes<N>(extent.channels, [&](auto lanes, int64_t c) INLINE_LAMBDA {
          constexpr int M = lanes.value;
          Store<M>(out + Lane(c, to.block), Load<M>(in + Lane(c, from.block)));
        });
      }
    }
  }
};

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]. Rows of a are `a_row` apart, its columns `a_column`,
// rows of c `c_row`; b is dense. Each value is summed in the order of depth. With a norm, row r of c may also lie at
// `places[r]`, and each kLanes of its columns `c_block` apart.
struct Product {
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  float* c;
  int64_t c_row, rows, columns, depth;
  bool adds;
  Ending ending{};
  const int64_t* places = nullptr;
  int64_t c_block = kLanes;

  template <int How, int N, int B, int R>
  INLINE void Tile(int64_t row, int64_t column) const {
    Vector<N> sums[B][R];
    float* to = c + row * c_row + column;
    const float* left = a + row * a_row;
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int j = 0; j < B; ++j) {
        if (adds) sums[j][r] = Load<N>(to + r * c_row + j * N);
        else sums[j][r] = Vector<N>{};
      }
    }
    const float* right = b + column;
    for (int64_t k = 0; k < depth; ++k, left += a_column, right += columns) {
      Vector<N> w[B];
      UNROLL for (int j = 0; j < B; ++j) w[j] = Load<N>(right + j * N);
      UNROLL for (int r = 0; r < R; ++r) {
        const float x = left[r * a_row];
        UNROLL for (int j = 0; j < B; ++j) sums[j][r] += w[j] * x;
      }
    }
    UNROLL for (int j = 0; j < B; ++j) {
      const float* added = ending.shortcut + row * c_row + column + j * N;
      ending.Apply<How, N>(column + j * N, sums[j], [&](int r) INLINE_LAMBDA { return added + r * c_row; });
    }
    if (How >= 0 && places != nullptr) {
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int j = 0; j < B; ++j) Store<N>(c + places[row + r] + Lane(column + j * N, c_block), sums[j][r]);
      }
      return;
    }
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int j = 0; j < B; ++j) Store<N>(to + r * c_row + j * N, sums[j][r]);
    }
  }

  template <int How, int N, int B, int R>
  INLINE void Rows(int64_t column) const {
    int64_t row = 0;
    for (; row + R <= rows; row += R) Tile<How, N, B, R>(row, column);
    for (; row + 2 <= rows; row += 2) Tile<How, N, B, 2>(row, column);
    for (; row < rows; ++row) Tile<How, N, B, 1>(row, column);
  }

  // B * R sums live in registers, with what they are made of.
  template <int How, int N, int B, int R>
  INLINE void All() const {
    int64_t column = 0;
    for (; column + B * N <= columns; column += B * N) Rows<How, N, B, R>(column);
    if constexpr (B > 2) {
      if (column + 2 * N <= columns) Rows<How, N, 2, R>(column), column += 2 * N;
    }
    for (; column + N <= columns; column += N) Rows<How, N, 1, R>(column);
    if constexpr (N > 8) {
      if (column + 8 <= columns) Rows<How, 8, 1, R>(column), column += 8;
    }
    if constexpr (N > 4) {
      if (column + 4 <= columns) Rows<How, 4, 1, R>(column), column += 4;
    }
    for (; column < columns; ++column) Rows<How, 1, 1, R>(column);
  }
};

}  // namespace

#endif  // NAS_NATIVE_ARITHMETIC_H_
