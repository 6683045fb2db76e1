// Calls the kernels of kernels.inc on buffers that end where the data do, for a build with a sanitizer to watch. Threads
// are those of the standard library, whose hand-over of memory ThreadSanitizer can see, and that of libgomp it cannot.

#include "kernels.inc"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

namespace {
thread_local int team = 1, member = 0;
}

extern "C" int omp_get_num_threads() { return team; }
extern "C" int omp_get_thread_num() { return member; }
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> threads;
  for (unsigned k = 0; k < count; k++) {
    threads.emplace_back([=] {
      team = int(count), member = int(k);
      body(data);
    });
  }
  for (auto& thread : threads) thread.join();
}

namespace {

// `numel` elements behind `offset` others, in a block of its own: unaligned, and with an end that can be watched.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> block;
  int64_t numel, offset;
  Buffer(int64_t numel, int64_t offset, unsigned seed) : block(new T[numel + offset]), numel(numel), offset(offset) {
    for (int64_t i = 0; i < offset; i++) block[i] = T(77.0f);
    for (int64_t i = 0; i < numel; i++) {
      seed = seed * 1664525u + 1013904223u;
      block[offset + i] = T(float(int32_t(seed)) * 0x1p-29f);
    }
  }
  T* data() const { return block.get() + offset; }
  bool is_whole() const {
    for (int64_t i = 0; i < offset; i++) {
      if (!(float(block[i]) == 77.0f)) return false;
    }
    return true;
  }
};

void check(bool right, const char* what, int64_t numel, int threads, int64_t offset) {
  if (right) return;
  std::printf("%s: wrong for %ld elements, %d threads, offset %ld\n", what, long(numel), threads, long(offset));
  std::exit(1);
}

template <class T>
bool same(const Buffer<T>& a, const Buffer<T>& b) {
  return a.is_whole() && b.is_whole() && std::memcmp(a.data(), b.data(), a.numel * sizeof(T)) == 0;
}

// A kernel with up to three inputs and two outputs, beside itself on one thread and aligned memory.
template <class T, class Call>
void compare(const char* what, int64_t numel, int threads, int64_t offset, Call call) {
  Buffer<T> a(numel, offset, 1), b(numel, offset + 1, 2), c(numel, 0, 3), y(numel, offset, 4), z(numel, 0, 5);
  Buffer<T> a0(numel, 0, 1), b0(numel, 0, 2), c0(numel, 0, 3), y0(numel, 0, 4), z0(numel, 0, 5);
  call(threads, y, z, a, b, c);
  call(1, y0, z0, a0, b0, c0);
  check(same(y, y0) && same(z, z0), what, numel, threads, offset);
}

const double numbers[] = {2.0, 0.6, 0.5, 0.4};  // r and e, and as many others as any of these kernels takes

#define COMPARE(T, suffix)                                                                                            \
  void compare_all(T, int64_t numel, int threads, int64_t offset) {                                                   \
    using B = Buffer<T>;                                                                                              \
    compare<T>("forward", numel, threads, offset, [=](int threads, B& y, B&, B& a, B&, B&) {                          \
      forward_##suffix(numel, threads, numbers, y.data(), a.data());                                                  \
    });                                                                                                               \
    compare<T>("backward", numel, threads, offset, [=](int threads, B& y, B&, B& a, B& b, B&) {                       \
      backward_##suffix(numel, threads, numbers, y.data(), a.data(), b.data());                                       \
    });                                                                                                               \
    compare<T>("glu", numel, threads, offset, [=](int threads, B& y, B&, B& a, B& b, B&) {                            \
      glu_##suffix(numel, threads, numbers, y.data(), a.data(), b.data());                                            \
    });                                                                                                               \
    compare<T>("glu_backward", numel, threads, offset, [=](int threads, B& y, B& z, B& a, B& b, B& c) {               \
      glu_backward_##suffix(numel, threads, numbers, y.data(), z.data(), a.data(), b.data(), c.data());               \
    });                                                                                                               \
    COMPARE_AT(T, suffix)                                                                                             \
  }
#if HAS_SLOPE_AT
#define COMPARE_AT(T, suffix)                                                                                         \
  compare<T>("backward_at", numel, threads, offset, [=](int threads, B& y, B&, B& a, B& b, B&) {                      \
    backward_at_##suffix(numel, threads, numbers, y.data(), a.data(), b.data());                                      \
  });
#else
#define COMPARE_AT(T, suffix)
#endif

COMPARE(float, float32)
COMPARE(at::BFloat16, bfloat16)
COMPARE(at::Half, float16)

void everything(int64_t numel, int threads, int64_t offset) {
  compare_all(float{}, numel, threads, offset);
  compare_all(at::BFloat16{}, numel, threads, offset);
  compare_all(at::Half{}, numel, threads, offset);
}

}  // namespace

int main() {
  // Registers and rests of them, shares of threads and rests of them, fewer shares than threads.
  for (int64_t numel = 1; numel < 140; numel++) everything(numel, 1, numel % 4);
  for (int threads : {2, 3, 7}) {
    for (int64_t numel : {1, 63, 64, 65, 127, 129, 448, 449, 1021, 4099}) everything(numel, threads, numel % 3);
  }
  // Several callers at once, as of several models.
  std::vector<std::thread> callers;
  for (int k = 0; k < 4; k++) callers.emplace_back([=] { everything(777 + k, 1 + k % 2, k); });
  for (auto& caller : callers) caller.join();
#ifdef BREAK_IT
  Buffer<float> x(65, 0, 1), y(64, 0, 2);
  forward_float32(65, 2, numbers, y.data(), x.data());  // one element too many, by two threads
  std::thread other([&] { forward_float32(64, 1, numbers, y.data(), x.data()); });
  forward_float32(64, 1, numbers, y.data(), x.data());  // and the same elements
  other.join();
#endif
  std::puts("nothing found");
}
