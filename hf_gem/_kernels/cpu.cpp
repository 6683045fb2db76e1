// The family on a CPU, for one n. The build puts `#define GEM_N n` before this file and compiles it with the flags that
// Inductor uses for the machine: vector instructions, OpenMP, no contraction of products and sums.
//
// These are the formulas of reference.py, the same operations in the same order in float32, so the results are the same
// bits; change both together. What differs: several results come out of one pass, and work that cannot change a lane is
// skipped (`zero_mask`).

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace {

using V = at::vec::Vectorized<float>;
using VInt = at::vec::Vectorized<int32_t>;
constexpr int N = GEM_N;

template <int K>
inline V power(V x) {
  V base = x, result = x;
  for (int k = K - 1; k > 0;) {
    if (k % 2 == 1) result = result * base;
    k /= 2;
    if (k > 0) base = base * base;
  }
  return result;
}

// The scaling of x and eps (reference._scale), and the bound past which the gate is 1.
struct Scale {
  V r, e, bound, r_over_bound;
  Scale(float r, float e, float bound) : r(r), e(e), bound(bound), r_over_bound(r / bound) {}
};

inline V gate_power(V v, const Scale& k) {
  return power<2 * N>(at::vec::clamp_max(at::vec::clamp_min(v, V(0.f)), k.bound));
}

struct Egem {
  static inline void value_and_slope(V z, const Scale& k, V& value, V& slope) {
    V t = gate_power(z * k.r, k);
    V s = t / (t + k.e);
    value = at::vec::clamp_min(z, V(0.f)) * s;
    slope = s * (V(1.f + 2 * N) - s * V(2.f * N));
  }
};

struct Segem {
  static inline void value_and_slope(V z, const Scale& k, V& value, V& slope) {
    V minus = z.neg();
    V t = gate_power(minus * k.r, k);
    V inverse = V(1.f) / (t + k.e);  // torch, too, divides a number by a tensor so
    V c = inverse * k.e;
    V inside = minus * c, factor = c;
    V w = minus * k.r_over_bound;
    V far = w >= V(1.f);  // the gate is past its bound there, and 1 - s falls as the power -2n
    if (far.zero_mask() != (1 << V::size()) - 1) {
      V q = V(1.f) / V::blendv(V(1.f), w, far);
      V positive = at::vec::clamp_max(at::vec::clamp_min(minus, V(0.f)), V(std::numeric_limits<float>::max()));
      inside = ((positive * q) * c) * power<2 * N - 1>(q);
      factor = c * power<2 * N>(q);
    }
    V negative = z < V(0.f);
    value = V::blendv(z, inside.neg(), negative);
    slope = V::blendv(V(1.f), factor * (V(1.f) - inverse * t * V(2.f * N)), negative);
  }
};

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// reference.egem_slope_at
template <int steps>
inline V slope_at(V y, const Scale& k) {
  constexpr int32_t one = 127 << 23, root_bias = 350000;
  V w = at::vec::clamp_max(at::vec::clamp_min(y * k.r, V(0.f)), k.bound);
  V u = at::vec::clamp_min(w, V(0x1p-40f));
  V h = u * k.e;
  V logarithm = at::vec::convert<float>(bits<VInt>(h) - VInt(one));
  V rho = bits<V>(at::vec::convert<int32_t>(logarithm * V(float(1.0 / (2 * N + 1)))) + VInt(one - root_bias));
  V v = at::vec::maximum(u, rho) + at::vec::minimum(u, rho) * V(float(0.1 + 0.3 / N));
  for (int step = 0; step < steps; step++) {
    V t = power<2 * N>(v);
    V b = t * v;
    V p = b + h * V(2.f * N);
    V f = (b - t * u) - h;
    v = v - v * (f * p / (p * p + (h * f) * V(float(N * (2 * N + 1)))));
  }
  V s = w / v;
  return s * (V(1.f + 2 * N) - s * V(2.f * N));
}

// What a block of inputs becomes: V... -> std::tuple<V...>
template <class Form>
struct Activation {
  Scale k;
  std::tuple<V> operator()(V z) const {
    V value, slope;
    Form::value_and_slope(z, k, value, slope);
    return {value};
  }
};

template <class Form>
struct Backward {
  Scale k;
  std::tuple<V> operator()(V grad, V z) const {
    V value, slope;
    Form::value_and_slope(z, k, value, slope);
    return {grad * slope};
  }
};

template <int steps>
struct BackwardAt {
  Scale k;
  std::tuple<V> operator()(V grad, V y) const { return {grad * slope_at<steps>(y, k)}; }
};

template <class Form>
struct Glu {
  Scale k;
  std::tuple<V> operator()(V gate, V up) const {
    V value, slope;
    Form::value_and_slope(gate, k, value, slope);
    return {value * up};
  }
};

template <class Form>
struct GluBackward {
  Scale k;
  std::tuple<V, V> operator()(V grad, V gate, V up) const {
    V value, slope;
    Form::value_and_slope(gate, k, value, slope);
    return {grad * up * slope, grad * value};
  }
};

template <class T>
inline std::tuple<V, V> widen(at::vec::Vectorized<T> x) {
  return at::vec::convert_to_float<T>(x);
}

// `count` elements from i on, a register of T: one of float, two for the half types.
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
      auto low = f(std::get<0>(x)...), high = f(std::get<1>(x)...);
      (store(at::vec::convert_from_float<T>(std::get<O>(low), std::get<O>(high)), std::get<O>(out)), ...);
    };
    run(widen<T>(load(in))...);
  }
}

template <class T, class F, class... Out, class... In>
void map(F function, int64_t numel, int threads, std::tuple<Out*...> out, const In*... in) {
  constexpr int64_t size = at::vec::Vectorized<T>::size();
  constexpr auto outputs = std::index_sequence_for<Out...>{};
  auto range = [&](int64_t begin, int64_t end) {
    const F f = function;  // a copy that stores through `out` cannot alias, so that its constants stay in registers
    int64_t i = begin;
    for (; i + size <= end; i += size) block<T>(f, i, size, out, outputs, in...);
    if (i < end) block<T>(f, i, end - i, out, outputs, in...);
  };
  if (threads <= 1) return range(0, numel);
  const int64_t share = ((numel + threads - 1) / threads + 63) / 64 * 64;
#pragma omp parallel for num_threads(threads)
  for (int k = 0; k < threads; k++) range(std::min(numel, k * share), std::min(numel, (k + 1) * share));
}

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#define CONFIG int64_t numel, int threads, float r, float e, float bound

#define FORM(name, Form, T)                                                                                     \
  EXPORT void name(CONFIG, T* y, const T* x) {                                                                  \
    map<T>(Activation<Form>{{r, e, bound}}, numel, threads, std::tuple<T*>(y), x);                              \
  }                                                                                                             \
  EXPORT void name##_backward(CONFIG, T* grad_x, const T* grad, const T* x) {                                   \
    map<T>(Backward<Form>{{r, e, bound}}, numel, threads, std::tuple<T*>(grad_x), grad, x);                     \
  }                                                                                                             \
  EXPORT void name##_glu(CONFIG, T* y, const T* gate, const T* up) {                                            \
    map<T>(Glu<Form>{{r, e, bound}}, numel, threads, std::tuple<T*>(y), gate, up);                              \
  }                                                                                                             \
  EXPORT void name##_glu_backward(CONFIG, T* grad_gate, T* grad_up, const T* grad, const T* gate, const T* up) { \
    map<T>(GluBackward<Form>{{r, e, bound}}, numel, threads, std::tuple<T*, T*>(grad_gate, grad_up), grad, gate, up); \
  }

#define DTYPE(suffix, T, steps)                                                                                 \
  FORM(egem_##suffix, Egem, T)                                                                                  \
  FORM(segem_##suffix, Segem, T)                                                                                \
  EXPORT void egem_##suffix##_backward_at(CONFIG, T* grad_x, const T* grad, const T* y) {                       \
    map<T>(BackwardAt<steps>{{r, e, bound}}, numel, threads, std::tuple<T*>(grad_x), grad, y);                  \
  }

DTYPE(float32, float, 2)
DTYPE(bfloat16, at::BFloat16, N == 1 ? 1 : 2)
DTYPE(float16, at::Half, N == 1 ? 1 : 2)
