// Which pixels and taps meet in a convolution with SAME padding.

#ifndef NAS_NATIVE_GEOMETRY_H_
#define NAS_NATIVE_GEOMETRY_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

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

// The first output alone.
Columns First(Columns columns) {
  columns.phases.resize(1);
  columns.phases[0].count = std::min<int64_t>(columns.phases[0].count, 1);
  return columns;
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

}  // namespace

#endif  // NAS_NATIVE_GEOMETRY_H_
