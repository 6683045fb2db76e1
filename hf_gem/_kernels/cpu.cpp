// The CPU kernels of one family for one n. `printer.py` replaces the line FORMULAS by the formulas of the family, and
// the build compiles the file with Inductor's flags for the machine: vector instructions, OpenMP, no contraction of
// products and sums. So the results equal those of the formulas in torch bit for bit. A kernel computes several results
// in one pass, and skips work that cannot change a lane.

#include <ATen/cpu/vec/functional.h>  // has the conversions of float16
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace {

using V = at::vec::Vectorized<float>;
using VInt = at::vec::Vectorized<int32_t>;

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// FORMULAS

// The operations on a block of inputs: V... -> std::tuple<V...>
struct Activation {
  Constants k;
  std::tuple<V> operator()(V z) const {
    V value, slope;
    value_and_slope(z, k, value, slope);
    return {value};
  }
};

struct Backward {
  Constants k;
  std::tuple<V> operator()(V grad, V z) const {
    V value, slope;
    value_and_slope(z, k, value, slope);
    return {grad * slope};
  }
};

struct Glu {
  Constants k;
  std::tuple<V> operator()(V gate, V up) const {
    V value, slope;
    value_and_slope(gate, k, value, slope);
    return {value * up};
  }
};

struct GluBackward {
  Constants k;
  std::tuple<V, V> operator()(V grad, V gate, V up) const {
    V value, slope;
    value_and_slope(gate, k, value, slope);
    return {grad * up * slope, grad * value};
  }
};

#if HAS_SLOPE_AT
template <class T>
struct BackwardAt {
  Constants k;
  std::tuple<V> operator()(V grad, V y) const {
    V slope;
    if constexpr (std::is_same_v<T, float>) slope_at_24(y, k, slope);
    if constexpr (std::is_same_v<T, at::BFloat16>) slope_at_8(y, k, slope);
    if constexpr (std::is_same_v<T, at::Half>) slope_at_11(y, k, slope);
    return {grad * slope};
  }
};
#endif

// Half types are computed in two registers of floats. For bfloat16, one holds the even elements and the other the odd
// ones. Each element becomes the upper half of the float in its place, so none moves to another lane.

template <class T>
inline std::tuple<V, V> widen(at::vec::Vectorized<T> x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const VInt both = bits<VInt>(x);
    return {bits<V>(both << VInt(16)), bits<V>(both & VInt(-0x10000))};
  } else {
    return at::vec::convert_to_float<T>(x);
  }
}

// Rounds to the upper sixteen bits, ties to even. A NaN stays a NaN if its lower half is zero, as in NaNs that come
// from bfloat16 or from arithmetic.
inline VInt rounded(V x) {
  const VInt b = bits<VInt>(x);
  return b + VInt(0x7fff) + ((b >> VInt(16)) & VInt(1));
}

template <class T>
inline at::vec::Vectorized<T> narrow(V first, V second) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const VInt even = (rounded(first) >> VInt(16)) & VInt(0xffff), odd = rounded(second) & VInt(-0x10000);
    return bits<at::vec::Vectorized<T>>(even | odd);
  } else {
    return at::vec::convert_from_float<T>(first, second);
  }
}

// Computes `count` elements from i on, at most one register of T. Half types need two registers of floats.
template <class T, class F, class... Out, class... In, size_t... O>
inline void block(const F& f, int64_t i, int64_t count, std::tuple<Out*...> out, std::index_sequence<O...>, const In*... in) {
  using VT = at::vec::Vectorized<T>;
  const bool full = count == VT::size();
  auto load = [&](const T* p) { return full ? VT::loadu(p + i) : VT::loadu(p + i, count); };
  auto store = [&](VT x, T* p) { full ? x.store(p + i) : x.store(p + i, count); };
  if constexpr (std::is_same_v<T, float>) {
    auto result = f(load(in)...);
    (store(std::get<O>(result), std::get<O>(out)), ...);
  } else {
    auto run = [&](const auto&... x) {
      auto first = f(std::get<0>(x)...), second = f(std::get<1>(x)...);
      (store(narrow<T>(std::get<O>(first), std::get<O>(second)), std::get<O>(out)), ...);
    };
    run(widen<T>(load(in))...);
  }
}

// Takes all arguments by value: stores through `out` cannot change them, so they stay in registers.
template <class T, class F, class... Out, class... In>
void range(F f, int64_t i, int64_t end, std::tuple<Out*...> out, const In*... in) {
  constexpr int64_t size = at::vec::Vectorized<T>::size();
  constexpr auto outputs = std::index_sequence_for<Out...>{};
  for (; i + size <= end; i += size) block<T>(f, i, size, out, outputs, in...);
  if (i < end) block<T>(f, i, end - i, out, outputs, in...);
}

template <class T, class F, class... Out, class... In>
void map(F f, int64_t numel, int threads, std::tuple<Out*...> out, const In*... in) {
  if (threads <= 1) return range<T>(f, 0, numel, out, in...);
  const int64_t share = ((numel + threads - 1) / threads + 63) / 64 * 64;
#pragma omp parallel for num_threads(threads)
  for (int k = 0; k < threads; k++) {
    range<T>(f, std::min(numel, k * share), std::min(numel, (k + 1) * share), out, in...);
  }
}

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
// The numbers are those of `printer.numbers`.
#define CONFIG int64_t numel, int threads, const double* numbers

#define KERNELS(suffix, T)                                                                                      \
  EXPORT void forward_##suffix(CONFIG, T* y, const T* x) {                                                      \
    map<T>(Activation{{numbers}}, numel, threads, std::tuple<T*>(y), x);                                        \
  }                                                                                                             \
  EXPORT void backward_##suffix(CONFIG, T* grad_x, const T* grad, const T* x) {                                 \
    map<T>(Backward{{numbers}}, numel, threads, std::tuple<T*>(grad_x), grad, x);                               \
  }                                                                                                             \
  EXPORT void glu_##suffix(CONFIG, T* y, const T* gate, const T* up) {                                          \
    map<T>(Glu{{numbers}}, numel, threads, std::tuple<T*>(y), gate, up);                                        \
  }                                                                                                             \
  EXPORT void glu_backward_##suffix(CONFIG, T* grad_gate, T* grad_up, const T* grad, const T* gate, const T* up) { \
    map<T>(GluBackward{{numbers}}, numel, threads, std::tuple<T*, T*>(grad_gate, grad_up), grad, gate, up);     \
  }

#if HAS_SLOPE_AT
#define KERNELS_AT(suffix, T)                                                                                   \
  EXPORT void backward_at_##suffix(CONFIG, T* grad_x, const T* grad, const T* y) {                              \
    map<T>(BackwardAt<T>{{numbers}}, numel, threads, std::tuple<T*>(grad_x), grad, y);                          \
  }
#else
#define KERNELS_AT(suffix, T)
#endif

#define DTYPE(suffix, T) KERNELS(suffix, T) KERNELS_AT(suffix, T)

DTYPE(float32, float)
DTYPE(bfloat16, at::BFloat16)
DTYPE(float16, at::Half)
