// Convolutions with batch norm on CPU, as handlers for XLA's foreign function interface.
//
// Images are [N, H, W, C], or [N, room]: each image's values and then room for more; weights are [kh, kw, C, C'], or
// [kh, kw, 1, C] of a depthwise convolution. All is float32; SAME padding; any stride, image, kernel and channel count.
// build.py compiles this file, __init__.py registers its handlers. It is compiled for the baseline of the architecture;
// on x86-64 it also holds clones for wider vectors, one of which is chosen when it is loaded.
//
// A result never depends on the number of threads: each sum is taken by one thread in one order, and the parts of which
// a sum over images is made depend on the shapes alone. Nor does a channel depend on how many there are beside it.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convolutions.h"
#include "xla/ffi/api/ffi.h"

namespace {

using Tensor = ffi::Buffer<ffi::F32, 4>;
using Values = ffi::Buffer<ffi::F32, 2>;  // [N, room]
using Channels = ffi::Buffer<ffi::F32, 1>;
using Sums = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::Result<Tensor>;

constexpr int64_t kTaskPixels = 1 << 10;  // of channel sums in a task at most: one after the other, more lose digits

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
  return {x[0], x[1], x[2], x[3], CeilDivide(x[1], stride), CeilDivide(x[2], stride), x[3], w[0], w[1], stride,
          Layer::kDepthwise};
}

constexpr Affine kAsItIs{nullptr, nullptr, nullptr, -1};

ffi::Error Forward(ffi::ThreadPool pool, Tensor x, Tensor w, Result y, int64_t stride) {
  if (ffi::Error error = Check(x, w, *y, stride); error.failure()) return error;
  const Layer layer = Depthwise(x, w, stride);
  DepthwiseForward(pool, layer, {x.typed_data(), layer.in_pixels() * layer.inputs, kAsItIs}, w.typed_data(), {},
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

// Whether these are of a map of so many channels.
bool Fit(int64_t channels, const Channels& centre, const Channels& scale, const Channels& offset) {
  const auto size = static_cast<size_t>(channels);
  return centre.element_count() == size && scale.element_count() == size && offset.element_count() == size;
}

// The layer that operands of these shapes are of; an error where they are of none.
ffi::ErrorOr<Layer> LayerOf(const Values& x, const Tensor& w, const Channels& centre, const Channels& scale,
                            const Channels& offset, int64_t y_images, int64_t y_room, int64_t height, int64_t width,
                            int64_t stride) {
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
  const bool fits = Fit(inputs, centre, scale, offset) && y_images == images[0] && images[1] >= layer.in_pixels() * inputs &&
                    y_room >= layer.out_pixels() * outputs;
  if (fits) return layer;
  return ffi::Unexpected(ffi::Error::InvalidArgument("fused convolution: shapes that do not fit together"));
}

constexpr decltype(&DenseForward) kForward[] = {DepthwiseForward, PointwiseForward, DenseForward};

ffi::Error FusedForward(ffi::ThreadPool pool, Values x, Tensor w, Channels centre, Channels scale, Channels offset,
                        ffi::Result<Values> y, ffi::Result<Sums> moments, int64_t height, int64_t width,
                        int64_t stride, int64_t activation, int64_t measures) {
  const auto layer = LayerOf(x, w, centre, scale, offset, y->dimensions()[0], y->dimensions()[1], height, width, stride);
  if (layer.has_error()) return layer.error();
  const Source from{x.typed_data(), x.dimensions()[1],
                    {centre.typed_data(), scale.typed_data(), offset.typed_data(), activation}};
  kForward[layer->kind](pool, *layer, from, w.typed_data(), {}, y->typed_data(), y->dimensions()[1],
                        measures ? moments->typed_data() : nullptr);
  if (!measures) std::fill_n(moments->typed_data(), moments->element_count(), 0.0f);
  return ffi::Error::Success();
}

enum Wanted : int64_t { kBoth, kOperand, kWeights };  // of a dense convolution: others give both

ffi::Error FusedBackward(ffi::ThreadPool pool, Values gradient, Values y, Channels constant, Channels slope,
                         Channels mean, Values x, Tensor w, Channels centre, Channels scale, Channels offset,
                         ffi::Result<Values> dx, ffi::Result<Tensor> dw, ffi::Result<Sums> sums, int64_t height,
                         int64_t width, int64_t stride, int64_t activation, int64_t measures, int64_t wanted) {
  const auto layer = LayerOf(x, w, centre, scale, offset, y.dimensions()[0], y.dimensions()[1], height, width, stride);
  if (layer.has_error()) return layer.error();
  const Source from{x.typed_data(), x.dimensions()[1],
                    {centre.typed_data(), scale.typed_data(), offset.typed_data(), activation}};
  Gradients gradients{gradient.typed_data(), y.typed_data(),     y.dimensions()[1],
                      constant.typed_data(), slope.typed_data(), mean.typed_data(),
                      dx->typed_data(),      dw->typed_data(),   sums->typed_data()};
  if (!measures) gradients.constant = nullptr;
  if (wanted == kOperand) gradients.weights = nullptr;
  if (wanted == kWeights) gradients.dx = gradients.sums = nullptr;
  constexpr decltype(&DenseBackward) kBackward[] = {DepthwiseBackward, PointwiseBackward, DenseBackward};
  kBackward[layer->kind](pool, *layer, from, w.typed_data(), gradients);
  return ffi::Error::Success();
}

// Of a 1x1 convolution that is not computed.
ffi::Error Moments(ffi::ThreadPool pool, Values x, Tensor w, Channels centre, Channels scale, Channels offset,
                   ffi::Result<Sums> moments, int64_t height, int64_t width, int64_t activation) {
  const int64_t room = height * width * w.dimensions()[3];
  const auto layer = LayerOf(x, w, centre, scale, offset, x.dimensions()[0], room, height, width, 1);
  if (layer.has_error()) return layer.error();
  if (layer->kind != Layer::kPointwise) return ffi::Error::InvalidArgument("moments: not a 1x1 convolution");
  const Source from{x.typed_data(), x.dimensions()[1],
                    {centre.typed_data(), scale.typed_data(), offset.typed_data(), activation}};
  PointwiseMoments(pool, *layer, from, w.typed_data(), moments->typed_data());
  return ffi::Error::Success();
}

// One convolution; or two or three, a bottleneck. `activations` are those before each of them, and after the last; operands
// of convolutions that there are not are of any value. The moments, if anybody asks, are those of two convolutions.
ffi::Error Chain(ffi::ThreadPool pool, Values x, Channels centre, Channels scale, Channels offset, Tensor kernel,
                 Channels centre_2, Channels scale_2, Channels offset_2, Tensor depthwise, Channels centre_3,
                 Channels scale_3, Channels offset_3, Tensor project, Channels centre_4, Channels scale_4,
                 Channels offset_4, Values shortcut, ffi::Result<Values> y, ffi::Result<Sums> moments, int64_t height,
                 int64_t width, int64_t stride, int64_t measures, int64_t adds, int64_t links,
                 ffi::Span<const int64_t> activations) {
  const auto images = x.dimensions(), e = kernel.dimensions(), d = depthwise.dimensions(), p = project.dimensions();
  const ffi::Error misfit = ffi::Error::InvalidArgument("chain of convolutions: shapes that do not fit together");
  if (stride < 1 || height < 1 || width < 1 || links < 1 || links > 3 || activations.size() != 4) return misfit;
  const int64_t pixels = CeilDivide(height, stride) * CeilDivide(width, stride), wide = e[3];
  const int64_t outputs = links == 3 ? p[3] : wide, size = pixels * outputs;
  const Ending closing{{centre_4.typed_data(), scale_4.typed_data(), offset_4.typed_data(), activations[3]},
                        adds ? shortcut.typed_data() : nullptr};
  const bool closes = closing.identity() || Fit(outputs, centre_4, scale_4, offset_4);
  const bool sums = !adds || (shortcut.dimensions() == y->dimensions() && activations[3] == kNone);
  const bool measured = !measures || (links == 2 && closing.identity() &&
                                      static_cast<int64_t>(moments->element_count()) == 2 * wide);
  if (y->dimensions()[0] != images[0] || y->dimensions()[1] != size || !closes || !sums || !measured) return misfit;
  const Affine first{centre.typed_data(), scale.typed_data(), offset.typed_data(), activations[0]};
  if (links == 1) {
    const auto layer = LayerOf(x, kernel, centre, scale, offset, images[0], size, height, width, stride);
    if (layer.has_error()) return layer.error();
    kForward[layer->kind](pool, *layer, {x.typed_data(), images[1], first}, kernel.typed_data(), closing,
                          y->typed_data(), size, nullptr);
    std::fill_n(moments->typed_data(), moments->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  const bool expands = e[0] * e[1] == 1 && images[1] == height * width * e[2] && Fit(e[2], centre, scale, offset);
  const bool deepens = d[2] == 1 && d[3] == wide && Fit(wide, centre_2, scale_2, offset_2);
  const bool projects = links == 2 || (p[0] * p[1] == 1 && p[2] == wide && Fit(wide, centre_3, scale_3, offset_3));
  if (!expands || !deepens || !projects) return misfit;
  const Bottleneck bottleneck{
      {images[0], height, width, e[2], height, width, wide, 1, 1, 1, Layer::kPointwise},
      {images[0], height, width, wide, CeilDivide(height, stride), CeilDivide(width, stride), wide, d[0], d[1], stride,
       Layer::kDepthwise},
      first,
      {centre_2.typed_data(), scale_2.typed_data(), offset_2.typed_data(), activations[1]},
      {centre_3.typed_data(), scale_3.typed_data(), offset_3.typed_data(), activations[2]},
      kernel.typed_data(),
      depthwise.typed_data(),
      links == 3 ? project.typed_data() : nullptr,
      outputs,
      closing};
  bottleneck.Run(pool, x.typed_data(), y->typed_data(), measures ? moments->typed_data() : nullptr);
  if (!measures) std::fill_n(moments->typed_data(), moments->element_count(), 0.0f);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_pointwise_moments, Moments,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Tensor>().Arg<Channels>()
                                  .Arg<Channels>().Arg<Channels>().Ret<Sums>().Attr<int64_t>("height")
                                  .Attr<int64_t>("width").Attr<int64_t>("activation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    nas_chain, Chain,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Channels>().Arg<Channels>().Arg<Channels>().Arg<Tensor>()
        .Arg<Channels>().Arg<Channels>().Arg<Channels>().Arg<Tensor>().Arg<Channels>().Arg<Channels>().Arg<Channels>()
        .Arg<Tensor>().Arg<Channels>().Arg<Channels>().Arg<Channels>().Arg<Values>().Ret<Values>().Ret<Sums>()
        .Attr<int64_t>("height").Attr<int64_t>("width").Attr<int64_t>("stride").Attr<int64_t>("measures")
        .Attr<int64_t>("adds").Attr<int64_t>("links").Attr<ffi::Span<const int64_t>>("activations"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nas_blank, Blank, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

// What __init__.py asks: the hash of the source that this was compiled from, and the clone that is in use.
extern "C" const char* nas_native_source() { return NAS_SOURCE; }
extern "C" const char* nas_native_instructions() { return Chosen().name; }
