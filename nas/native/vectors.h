// Vectors of a few float32 channels, loops over channels, and activations.

#ifndef NAS_NATIVE_VECTORS_H_
#define NAS_NATIVE_VECTORS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

// What a clone calls is compiled for its instructions only if it is inlined into it.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// Before a loop over an array that has to live in registers.
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_ALL _Pragma("GCC unroll 32")

namespace {

// N values together; one by itself is a scalar.
template <typename T, int N>
struct Lanes {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T>
struct Lanes<T, 1> {
  typedef T type;
};
template <int N>
using Vector = typename Lanes<float, N>::type;
template <int N>
using Bits = typename Lanes<uint32_t, N>::type;

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

}  // namespace

#endif  // NAS_NATIVE_VECTORS_H_
