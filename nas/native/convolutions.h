// Convolutions and their gradients, on all threads: depthwise, 1x1, any other, and bottlenecks of three.

#ifndef NAS_NATIVE_CONVOLUTIONS_H_
#define NAS_NATIVE_CONVOLUTIONS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clones.h"
#include "threads.h"

namespace {

// Values of an operand that a task holds at a time: they stay in the second cache of a core, a slice of a depthwise
// convolution as a whole.
constexpr int64_t kTileValues = 1 << 15;
constexpr int64_t kSliceValues = 1 << 17;
constexpr int64_t kParts = 16;             // partial sums of a weight gradient, each over neighbouring images or pixels
constexpr int64_t kMomentPixels = 1 << 9;  // whose products are summed before they are added in double precision
constexpr int64_t kMergeValues = 1 << 12;  // of a weight gradient, in a task that adds its parts

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

// The ending that takes moments of `channels`, with scratch memory `which`; the caller writes what is a good guess of the
// mean to `shift`, say the first pixel.
Ending Measuring(int which, int64_t channels, float** shift) {
  Ending ending;
  ending.shift = *shift = Scratch(which, 3 * channels);
  ending.sums = *shift + channels, ending.squares = *shift + 2 * channels;
  std::fill_n(ending.sums, 2 * channels, 0.0f);
  return ending;
}

// Mean of each channel, and the sum of squared differences from it, to `to` and `to` + stride; of `count` pixels.
void Centre(const Ending& found, int64_t count, int64_t channels, float* to, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    const float mean = found.sums[c] / static_cast<float>(count);
    to[c] = found.shift[c] + mean;
    to[stride + c] = found.squares[c] - found.sums[c] * mean;
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
  if (affine.identity()) return Chosen().copy({extent, x, to});
  Chosen().enter({extent, x, affine.centre + channel, affine.scale + channel, affine.offset + channel,
                  affine.activation, to});
}

// The gradient of the result, to `to`; `from` floats into it.
void ReadGradient(const Extent& extent, const Gradients& g, int64_t from, int64_t row, int64_t pixel, int64_t channel,
                  const Out& to) {
  const In gradient{g.gradient + from, row, pixel};
  if (g.constant == nullptr) return Chosen().copy({extent, gradient, to});
  Chosen().total({extent, gradient, {g.y + from, row, pixel}, g.constant + channel, g.slope + channel,
                  g.mean + channel, to});
}

// Takes the gradient of what was read to that of x, at `dx`; adds those of the affine map to `sums` [2, stride].
void PullBack(const Extent& extent, const In& gradient, const In& x, const Affine& affine, int64_t channel,
              const Out& dx, float* sums, int64_t stride) {
  if (affine.identity()) return Chosen().copy({extent, gradient, dx});
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

// `made` from channel `channel` on, with what an ending does without moments, `at` floats into a result of pixels `pixel`
// floats apart. A norm and a sum with a shortcut, shortcut + (offset + scale * (made - centre)), are what `total` computes.
void Close(const Extent& extent, const In& made, const Ending& ending, int64_t channel, float* result, int64_t at,
           int64_t pixel) {
  const Out to{result + at, 0, pixel};
  if (ending.shortcut == nullptr) return Read(extent, made, ending.affine, channel, to);
  const Affine norm = ending.affine.From(channel);
  Chosen().total({extent, {ending.shortcut + at, 0, pixel}, made, norm.offset, norm.scale, norm.centre, to});
}

// ----------------------------------------------------------------------------------------------------------- depthwise

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

void DepthwiseForward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights,
                      const Ending& ending, float* y, int64_t room, float* moments) {
  const int64_t channels = layer.inputs, taps = layer.taps();
  const Slices slices(layer, kParts);
  const Axis rows = Forwards(layer.height, layer.kernel_height, layer.stride);
  const Columns columns = ColumnsForwards(layer.width, layer.kernel_width, layer.stride);
  const Columns left = First(columns);
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
    float* shift = nullptr;
    const Ending measuring = moments == nullptr ? Ending() : Measuring(3, blocks * kLanes, &shift);
    FillKernel(weights, taps, channels, begin, blocks, kernel);
    ZeroAround(layer.height, layer.width, channels, begin, blocks, columns.left, columns.width, in);
    for (int64_t image = first; image < last; ++image) {
      Read({layer.height, layer.width, width}, {x.data + image * x.room + begin, layer.width * channels, channels},
           x.affine, begin, {in + columns.left * kLanes, columns.width * kLanes, kLanes, in_size});
      for (int64_t block = 0; block * kLanes < width; ++block) {
        Strip strip{rows, columns, in + block * in_size, kernel + block * taps * kLanes, layer.kernel_width,
                    out + block * out_size, layer.out_width};
        if (shift != nullptr && image == first) {
          Chosen().convolve({rows, left, strip.in, strip.kernel, strip.kernel_width, shift + block * kLanes, 1, kLanes,
                             {}, 0, std::min<int64_t>(layer.out_height, 1)});
        }
        strip.ending = measuring.From(block * kLanes);
        Chosen().convolve(strip);
      }
      const Extent extent{1, layer.out_pixels(), width};
      const int64_t at = image * room + begin;
      Close(extent, {out, 0, kLanes, out_size}, ending, begin, y, at, channels);
    }
    if (moments == nullptr) return;
    const int64_t count = (last - first) * layer.out_pixels();
    if (begin == 0) counts[group] = count;
    Centre(measuring, count, width, parts.data() + group * 2 * channels + begin, channels);
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

// ----------------------------------------------------------------------------------------------------------- pointwise

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

void PointwiseForward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights,
                      const Ending& ending, float* y, int64_t room, float* moments) {
  const int64_t inputs = layer.inputs, outputs = layer.outputs, pixels = layer.images * layer.in_pixels();
  const int64_t tile = TilePixels(layer), tiles = CeilDivide(pixels, tile);
  std::vector<float> parts(moments == nullptr ? 0 : tiles * 2 * outputs);
  std::vector<int64_t> counts(tiles);
  Parallel(pool, tiles, [&](int64_t task) {
    const int64_t begin = task * tile, end = std::min(begin + tile, pixels);
    const float* from = ReadRun(x, {layer.in_pixels(), inputs, x.room, begin, end});
    Ending mine = ending;
    if (moments != nullptr) {
      float* shift;
      mine = Measuring(1, outputs, &shift);
      Chosen().multiply({from, inputs, 1, weights, shift, outputs, 1, outputs, inputs, false});
    }
    Run{layer.in_pixels(), outputs, room, begin, end}.For([&](const Extent& extent, int64_t at, int64_t done) {
      Chosen().multiply({from + done / outputs * inputs, inputs, 1, weights, y + at, outputs, extent.pixels, outputs,
                         inputs, false, mine.From(0, at)});
    });
    if (moments == nullptr) return;
    counts[task] = end - begin;
    Centre(mine, counts[task], outputs, parts.data() + task * 2 * outputs, outputs);
  });
  if (moments != nullptr) MergeMoments(parts, counts, outputs, moments);
}

// Mean and biased variance [2, outputs] of a 1x1 convolution, which is not computed: those of w x follow from the mean and
// the covariance of x. Where there are fewer inputs than outputs that is the smaller product.
void PointwiseMoments(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights, float* moments) {
  const int64_t inputs = layer.inputs, outputs = layer.outputs, size = inputs * inputs;
  const int64_t pixels = layer.images * layer.in_pixels(), part_pixels = std::max<int64_t>(CeilDivide(pixels, kParts), 1);
  const int64_t parts = CeilDivide(pixels, part_pixels), tile = std::min(TilePixels(layer), kMomentPixels);
  std::vector<float> shift(2 * inputs), zeros(inputs), ones(inputs, 1.0f);
  if (const int64_t some = std::min(tile, pixels); some > 0) {  // by the mean of the first ones; a single one may be odd
    const float* from = ReadRun(x, {layer.in_pixels(), inputs, x.room, 0, some});
    Chosen().reduce({from, from, zeros.data(), zeros.data(), shift.data(), shift.data() + inputs, inputs, 0, some});
    for (int64_t i = 0; i < inputs; ++i) shift[i] /= static_cast<float>(some);
  }
  std::vector<double> of_parts(parts * (inputs + size));  // sums of x - shift, and of its products
  Parallel(pool, parts, [&](int64_t part) {
    double* of_part = of_parts.data() + part * (inputs + size);
    const int64_t stop = std::min((part + 1) * part_pixels, pixels);
    for (int64_t begin = part * part_pixels; begin < stop; begin += tile) {
      const int64_t end = std::min(begin + tile, stop);
      const Extent extent{1, end - begin, inputs};
      const float* from = ReadRun(x, {layer.in_pixels(), inputs, x.room, begin, end});
      float* centred = Scratch(1, (end - begin) * inputs);
      float* found = Scratch(2, 2 * inputs + size);
      Chosen().enter({extent, {from, 0, inputs}, shift.data(), ones.data(), zeros.data(), kNone, {centred, 0, inputs}});
      Chosen().reduce({centred, centred, zeros.data(), zeros.data(), found, found + inputs, inputs, 0, end - begin});
      Chosen().multiply({centred, 1, inputs, centred, found + 2 * inputs, inputs, inputs, inputs, end - begin, false});
      for (int64_t k = 0; k < inputs; ++k) of_part[k] += found[k];
      for (int64_t k = 0; k < size; ++k) of_part[inputs + k] += found[2 * inputs + k];
    }
  });
  std::vector<double> total(inputs + size), mean(outputs), squares(outputs);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t k = 0; k < inputs + size; ++k) total[k] += of_parts[part * (inputs + size) + k] / pixels;
  }
  std::vector<float> covariance(size), spread(inputs * outputs);  // of x; times the weights
  for (int64_t k = 0; k < size; ++k) covariance[k] = total[inputs + k] - total[k / inputs] * total[k % inputs];
  Parallel(pool, CeilDivide(inputs, kLanes), [&](int64_t task) {
    const int64_t begin = task * kLanes, rows = std::min(kLanes, inputs - begin);
    Chosen().multiply({covariance.data() + begin * inputs, inputs, 1, weights, spread.data() + begin * outputs, outputs,
                       rows, outputs, inputs, false});
  });
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t o = 0; o < outputs; ++o) {
      const double weight = weights[i * outputs + o];
      mean[o] += weight * (shift[i] + total[i]);
      squares[o] += weight * spread[i * outputs + o];
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    moments[o] = static_cast<float>(mean[o]);
    moments[outputs + o] = static_cast<float>(std::max(squares[o], 0.0));
  }
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

// --------------------------------------------------------------------------------------------------------------- dense

// Any other convolution. A row of its outputs is, for each row of the kernel, the product of a matrix whose rows overlap
// (the pixels that an output meets lie together) and that row's weights.
void DenseForward(ffi::ThreadPool& pool, const Layer& layer, const Source& x, const float* weights,
                  const Ending& ending, float* y, int64_t room, float* moments) {
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
    // The first pixels of an output row; the last product has the whole sums, which it ends.
    const auto make = [&](int64_t row, int64_t pixels, float* to, const Ending& how) {
      const Reach down = rows.outputs[row];
      for (int64_t i = 0; i < down.count; ++i) {
        Chosen().multiply({in + (down.input + i) * row_size, layer.stride * inputs, 1,
                           weights + (down.tap + i) * depth * outputs, to, outputs, pixels, outputs, depth, i > 0,
                           i + 1 == down.count ? how : Ending()});
      }
    };
    Ending mine = ending;
    if (moments != nullptr) {
      float* shift;
      mine = Measuring(2, outputs, &shift);
      make(0, 1, shift, {});
    }
    for (int64_t row = 0; row < layer.out_height; ++row) {
      const int64_t at = image * room + row * layer.out_width * outputs;
      make(row, layer.out_width, y + at, mine.From(0, at));
    }
    if (moments != nullptr) Centre(mine, layer.out_pixels(), outputs, parts.data() + image * 2 * outputs, outputs);
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

// ---------------------------------------------------------------------------------------------------------- bottleneck

constexpr int64_t kBandValues = 1 << 13;  // of output rows, of which all channels are computed before the next rows
// Expansions of rows from this width on are written among the zeros that surround rows; narrower ones pass through a
// tile, which is faster there (measured).
constexpr int64_t kWideRow = 8;
constexpr int64_t kProjectedPixels = 96;  // of several images, that a task projects together at least

// 1x1 convolution, depthwise convolution, and 1x1 convolution unless `project` is null, with what is before each of them.
// Nothing between them leaves the cache: each image goes through all three, its wide rows as they are made.
struct Bottleneck {
  Layer expand, depthwise;
  Affine first, second, third;
  const float *expand_weights, *depthwise_weights, *project_weights;
  int64_t outputs;
  Ending ending;

  // `moments` [2, outputs] unless null: of the depthwise convolution, where that is the last.
  void Run(ffi::ThreadPool& pool, const float* x, float* y, float* moments) const {
    const int64_t wide = expand.outputs, taps = depthwise.taps(), blocks = CeilDivide(wide, kLanes);
    const int64_t padded = blocks * kLanes;
    const Axis rows = Forwards(depthwise.height, depthwise.kernel_height, depthwise.stride);
    const Columns columns = ColumnsForwards(depthwise.width, depthwise.kernel_width, depthwise.stride);
    const Columns left = First(columns);
    const int64_t in_size = depthwise.height * columns.width * kLanes, out_pixels = depthwise.out_pixels();
    const int64_t group = std::clamp<int64_t>(kProjectedPixels / std::max<int64_t>(out_pixels, 1), 1, 8);
    const int64_t band = std::clamp<int64_t>(TilePixels(expand) / expand.width, 1, expand.height);
    const int64_t groups = CeilDivide(expand.images, group);
    std::vector<float> kernel(padded * taps), parts(moments == nullptr ? 0 : groups * 2 * wide);
    std::vector<float> after(3 * padded);  // the affine map before the projection, with zeros for no channels
    std::vector<int64_t> counts(groups);
    FillKernel(depthwise_weights, taps, wide, 0, blocks, kernel.data());
    const bool projects = project_weights != nullptr;
    Ending middle;
    if (projects) {
      middle.affine = {after.data(), after.data() + padded, after.data() + 2 * padded, third.activation};
      std::copy_n(third.centre, wide, after.begin());
      std::copy_n(third.scale, wide, after.begin() + padded);
      std::copy_n(third.offset, wide, after.begin() + 2 * padded);
    }
    const bool direct = !projects && ending.identity() && padded == wide;  // the depthwise convolution writes to y
    const int64_t row_values = std::max<int64_t>(depthwise.out_width * wide, 1);
    const int64_t out_band = std::clamp<int64_t>(kBandValues / row_values, 1, depthwise.out_height);
    std::vector<int64_t> places(expand.in_pixels());  // of pixels among the zeros around rows
    for (int64_t pixel = 0; pixel < expand.in_pixels(); ++pixel) {
      places[pixel] = (pixel / expand.width * columns.width + columns.left + pixel % expand.width) * kLanes;
    }
    Parallel(pool, groups, [&](int64_t task) {
      const int64_t begin = task * group, images = std::min(group, expand.images - begin);
      float* in = Scratch(3, blocks * in_size);
      float* read = direct ? nullptr : Scratch(4, (projects ? images : 1) * out_pixels * padded);
      float* shift = nullptr;
      Ending mine = moments == nullptr ? middle : Measuring(5, padded, &shift);
      ZeroAround(depthwise.height, depthwise.width, wide, 0, blocks, columns.left, columns.width, in);
      for (int64_t image = begin; image < begin + images; ++image) {
        for (int64_t row = 0; row < expand.height; row += band) {
          const int64_t some = std::min(band, expand.height - row), pixels = some * expand.width;
          const int64_t place = image * expand.in_pixels() + row * expand.width;
          const Source source{x, expand.in_pixels() * expand.inputs, first};
          const float* from = ReadRun(source, {expand.in_pixels(), expand.inputs, source.room, place, place + pixels});
          if (expand.width >= kWideRow && !second.identity()) {
            Chosen().multiply({from, expand.inputs, 1, expand_weights, in, 0, pixels, wide, expand.inputs, false,
                               {second}, places.data() + row * expand.width, in_size});
            continue;
          }
          float* tile = Scratch(1, pixels * wide);
          Chosen().multiply({from, expand.inputs, 1, expand_weights, tile, wide, pixels, wide, expand.inputs, false});
          Read({some, expand.width, wide}, {tile, expand.width * wide, wide}, second, 0,
               {in + (row * columns.width + columns.left) * kLanes, columns.width * kLanes, kLanes, in_size});
        }
        const int64_t slot = projects ? image - begin : 0;
        float* out = direct ? y + image * out_pixels * wide : read + slot * out_pixels * padded;
        for (int64_t row = 0; row < depthwise.out_height; row += out_band) {
          for (int64_t block = 0; block < blocks; ++block) {
            Strip strip{rows, columns, in + block * in_size, kernel.data() + block * taps * kLanes,
                        depthwise.kernel_width, out + block * kLanes, depthwise.out_width, padded};
            if (shift != nullptr && image == begin && row == 0) {
              Chosen().convolve({rows, left, strip.in, strip.kernel, strip.kernel_width, shift + block * kLanes, 1,
                                 kLanes, {}, 0, 1});
            }
            strip.ending = mine.From(block * kLanes);
            strip.begin = row, strip.end = std::min(row + out_band, depthwise.out_height);
            Chosen().convolve(strip);
          }
        }
        if (!projects && !direct) {
          Close({1, out_pixels, wide}, {out, 0, padded}, ending, 0, y, image * out_pixels * wide, wide);
        }
      }
      if (moments != nullptr) {
        counts[task] = images * out_pixels;
        Centre(mine, counts[task], wide, parts.data() + task * 2 * wide, wide);
      }
      if (!projects) return;
      const int64_t at = begin * out_pixels * outputs;
      Chosen().multiply({read, padded, 1, project_weights, y + at, outputs, images * out_pixels, outputs, wide, false,
                         ending.From(0, at)});
    });
    if (moments != nullptr) MergeMoments(parts, counts, wide, moments);
  }
};

}  // namespace

#endif  // NAS_NATIVE_CONVOLUTIONS_H_
