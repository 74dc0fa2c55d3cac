// Runs CUDA C++ kernels on a CPU, for tests: what a kernel needs of CUDA, one fiber a thread.
//
// Blocks run one after another. Within a block a fiber runs until its next barrier or collective of
// a warp, and in an order that the caller's seed picks: a missing barrier changes results. Shared
// memory is filled with 0xFF (NaN, -1) before each block. What no GPU would forgive is a failure
// with a sentence: barriers that part of a block meets, collectives that lanes of a warp do not
// meet together, partial masks, misaligned vector loads. Not seen here: races between blocks, the
// order of memory, speed.
//
// Linux, g++ (or clang++), 64 bits. Every kernel file is one translation unit, so all is static.
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __constant__ static const
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("fp_shared"), aligned(16)))

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
static constexpr int warpSize = 32;

extern "C" {
extern char __start_fp_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_fp_shared[] __attribute__((weak, visibility("hidden")));
}

// --- fibers --------------------------------------------------------------------------------------

namespace simulated {

constexpr size_t stack_bytes = 128 * 1024;

enum State { ready, at_barrier, at_collective, done };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = done;
  int line = 0;           // of the barrier or collective at which it stands
  unsigned meetings = 0;  // collectives so far: odd and even ones use different slots
  dim3 index;
  std::vector<char> stack;
};

struct Slot { uint32_t words[12]; };  // what one lane hands to its warp

static std::vector<Fiber> fibers;
static std::vector<Slot> slots;  // [warp][odd or even meeting][lane]
static int current;
static jmp_buf scheduler;
static void (*body)(void*);
static void* body_arguments;
static const char* kernel_name;
static char message[400];

[[noreturn]] static void fail(const char* what) {
  snprintf(message, sizeof message, "%s: %s (block %u,%u,%u, thread %d)", kernel_name, what,
           blockIdx.x, blockIdx.y, blockIdx.z, current);
  _longjmp(scheduler, 2);
}

static void stand_at(State state, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  fiber.line = line;
  if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
}

static void fiber_main() {
  for (;;) {  // a fiber serves one block after another
    body(body_arguments);
    stand_at(done, 0);
  }
}

[[noreturn]] static void resume(Fiber& fiber) {
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
  __builtin_unreachable();
}

__attribute__((no_sanitize("address"))) static void poison_shared_memory() {
  if (!__start_fp_shared) return;
  for (volatile char* p = __start_fp_shared; p < __stop_fp_shared; ++p) *p = (char)0xFF;
}

// Lets fibers of a block go on that stand where all they wait for stands too. In the scheduler.
static bool release() {
  const int count = (int)fibers.size();
  bool progress = false;
  for (int warp = 0; warp < count; warp += 32) {
    int standing = 0;
    bool apart = false;
    for (int i = warp; i < warp + 32; ++i) {
      standing += fibers[i].state == at_collective;
      apart = apart || fibers[i].line != fibers[warp].line;
    }
    if (standing < 32) continue;
    current = warp;
    if (apart) fail("lanes of a warp stand at different collectives");
    for (int i = warp; i < warp + 32; ++i) fibers[i].state = ready;
    progress = true;
  }
  int standing = 0, line = 0;
  bool apart = false;
  for (int i = 0; i < count; ++i) {
    if (fibers[i].state != at_barrier) continue;
    apart = apart || (line && line != fibers[i].line);
    line = fibers[i].line;
    current = i;
    ++standing;
  }
  if (standing == count) {
    if (apart) fail("threads of a block stand at different barriers");
    for (Fiber& fiber : fibers)
      if (fiber.state == at_barrier) fiber.state = ready;
    progress = true;
  }
  return progress;
}

static bool run_block(const std::vector<int>& order) {
  const int count = (int)fibers.size();
  poison_shared_memory();
  for (Fiber& fiber : fibers) {
    fiber.state = ready;
    fiber.meetings = 0;
  }
  volatile int live = count;
  for (volatile int next = 0; live; ++next) {
    if (next == count) {  // every fiber stands somewhere
      if (_setjmp(scheduler)) return false;
      if (!release()) fail("a barrier or collective that not all threads reach");
      next = 0;
    }
    if (fibers[order[next]].state != ready) continue;
    current = order[next];
    threadIdx = fibers[current].index;
    switch (_setjmp(scheduler)) {
      case 0: resume(fibers[current]);
      case 2: return false;
    }
    if (fibers[current].state == done) live = live - 1;
  }
  return true;
}

static void prepare_fibers(int count, const unsigned* block) {
  if ((int)fibers.size() != count) fibers = std::vector<Fiber>(count);
  slots.assign((size_t)count * 2, Slot{});
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.stack.empty()) fiber.stack.resize(stack_bytes);
    fiber.index.x = i % block[0];
    fiber.index.y = i / block[0] % block[1];
    fiber.index.z = i / (block[0] * block[1]);
  }
}

struct Random {  // a linear congruential generator
  uint64_t state;
  unsigned below(uint64_t limit) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((state >> 33) % limit);
  }
  template <class T> void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }
};

// Order 0 is forward, 1 backward, any other a shuffle of blocks and of the threads of each.
static bool run_grid(const unsigned* grid, const unsigned* block, unsigned seed) {
  gridDim.x = grid[0], gridDim.y = grid[1], gridDim.z = grid[2];
  blockDim.x = block[0], blockDim.y = block[1], blockDim.z = block[2];
  const int count = (int)(block[0] * block[1] * block[2]);
  const uint64_t block_count = (uint64_t)grid[0] * grid[1] * grid[2];
  snprintf(message, sizeof message, "%s: blocks of %d threads: expected a multiple of 32, to 1024",
           kernel_name, count);
  if (count % 32 || count < 32 || count > 1024) return false;
  snprintf(message, sizeof message, "%s: a grid of %u x %u x %u blocks cannot be launched",
           kernel_name, grid[0], grid[1], grid[2]);
  if (!block_count || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) return false;
  prepare_fibers(count, block);
  Random random{seed};
  std::vector<int> order(count);
  std::vector<uint64_t> blocks(block_count);
  for (int i = 0; i < count; ++i) order[i] = seed == 1 ? count - 1 - i : i;
  for (uint64_t i = 0; i < block_count; ++i) blocks[i] = seed == 1 ? block_count - 1 - i : i;
  if (seed > 1) random.shuffle(blocks);
  for (uint64_t number : blocks) {
    if (seed > 1) random.shuffle(order);
    blockIdx.x = number % grid[0];
    blockIdx.y = number / grid[0] % grid[1];
    blockIdx.z = number / grid[0] / grid[1];
    if (run_block(order)) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // they stand in the middle of a kernel
    return false;
  }
  return true;
}

// --- launching -----------------------------------------------------------------------------------

template <class... A> struct Call {
  void (*kernel)(A...);
  void** arguments;
  template <size_t... I> void go(std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
  }
  static void run(void* call) { ((Call*)call)->go(std::index_sequence_for<A...>{}); }
};

template <class... A>
static int launch(const char* name, void (*kernel)(A...), const unsigned* grid,
                  const unsigned* block, void** arguments, unsigned seed) {
  Call<A...> call{kernel, arguments};
  body = Call<A...>::run;
  body_arguments = &call;
  kernel_name = name;
  return run_grid(grid, block, seed) ? 0 : 1;
}

// Writes the size of each parameter, of a pointer as a negative number; returns how many there are.
template <class... A> static int signature(void (*)(A...), int* sizes) {
  int count = 0;
  ((sizes[count++] = (int)sizeof(A) * (std::is_pointer<A>::value ? -1 : 1)), ...);
  return count;
}

// --- collectives of a warp -----------------------------------------------------------------------

template <class T> static Slot to_slot(const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot), "a lane hands over 48 bytes at most");
  Slot slot{};
  memcpy(&slot, &value, sizeof value);
  return slot;
}

template <class T> static T from_slot(const Slot& slot) {
  T value;
  memcpy(&value, &slot, sizeof value);
  return value;
}

// Hands a value to the warp, meets it, and returns the values of its 32 lanes.
static const Slot* meet(unsigned mask, const Slot& own, int line) {
  if (mask != 0xffffffffu) fail("a collective of part of a warp: only full masks are emulated");
  Slot* all = &slots[(size_t)(current / 32 * 2 + (fibers[current].meetings++ & 1)) * 32];
  all[current % 32] = own;
  stand_at(at_collective, line);
  return all;
}

static inline int lane() { return current % 32; }

template <class T> static T from_lane(const Slot* all, int source) {
  return from_slot<T>(all[source & 31]);
}

// The lane that a shuffle reads, by the CUDA C++ programming guide: within parts of `width` lanes.
static inline int part(int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle's width is no power of 2");
  return lane() & ~(width - 1);
}
static inline int lane_at(int source, int width = 32) { return part(width) + (source & (width - 1)); }
static inline int lane_xor(int mask, int width = 32) {
  const int source = lane() ^ mask;
  return source < part(width) + width ? source : lane();
}
static inline int lane_down(unsigned delta, int width = 32) {
  const int source = lane() + (int)delta;
  return source < part(width) + width ? source : lane();
}
static inline int lane_up(unsigned delta, int width = 32) {
  const int source = lane() - (int)delta;
  return source >= part(width) ? source : lane();
}

static inline unsigned votes(const Slot* all) {
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (unsigned)(all[i].words[0] != 0) << i;
  return bits;
}

template <class T, class F> static T reduce(const Slot* all, F combine) {
  T result = from_slot<T>(all[0]);
  for (int i = 1; i < 32; ++i) result = combine(result, from_slot<T>(all[i]));
  return result;
}

}  // namespace simulated

#define FP_MEET(mask, value) simulated::meet(mask, simulated::to_slot(value), __LINE__)
#define FP_SHUFFLE(mask, value, source) \
  simulated::from_lane<std::decay_t<decltype(value)>>(FP_MEET(mask, value), source)
#define __shfl_sync(mask, value, source, ...) \
  FP_SHUFFLE(mask, value, simulated::lane_at(source, ##__VA_ARGS__))
#define __shfl_xor_sync(mask, value, bits, ...) \
  FP_SHUFFLE(mask, value, simulated::lane_xor(bits, ##__VA_ARGS__))
#define __shfl_down_sync(mask, value, delta, ...) \
  FP_SHUFFLE(mask, value, simulated::lane_down(delta, ##__VA_ARGS__))
#define __shfl_up_sync(mask, value, delta, ...) \
  FP_SHUFFLE(mask, value, simulated::lane_up(delta, ##__VA_ARGS__))
#define __ballot_sync(mask, test) simulated::votes(FP_MEET(mask, (unsigned)((test) ? 1 : 0)))
#define __any_sync(mask, test) (__ballot_sync(mask, test) != 0)
#define __all_sync(mask, test) (__ballot_sync(mask, test) == 0xffffffffu)
#define FP_REDUCE(mask, value, expression)                                        \
  simulated::reduce<std::decay_t<decltype(value)>>(FP_MEET(mask, value), [](auto a, auto b) { \
    return (decltype(a))(expression);                                             \
  })
#define __reduce_add_sync(mask, value) FP_REDUCE(mask, value, a + b)
#define __reduce_min_sync(mask, value) FP_REDUCE(mask, value, a < b ? a : b)
#define __reduce_max_sync(mask, value) FP_REDUCE(mask, value, a > b ? a : b)
#define __syncwarp(...) ((void)FP_MEET(0xffffffffu, 0u))
#define __syncthreads() simulated::stand_at(simulated::at_barrier, __LINE__)
#define __trap() simulated::fail("a trap")
static inline void __threadfence() {}

// --- arithmetic ----------------------------------------------------------------------------------

template <class T> static inline T __ldg(const T* where) {
  if ((uintptr_t)where % alignof(T)) simulated::fail("a misaligned load");
  return *where;
}

static inline float __uint_as_float(unsigned bits) {
  return simulated::from_slot<float>(simulated::to_slot(bits));
}
static inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
static inline unsigned __float_as_uint(float value) {
  return simulated::from_slot<unsigned>(simulated::to_slot(value));
}
static inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __ll2float_rn(long long x) { return (float)x; }
static inline float __double2float_rn(double x) { return (float)x; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }

#define FP_MIN_MAX(T)                                     \
  static inline T min(T x, T y) { return y < x ? y : x; } \
  static inline T max(T x, T y) { return x < y ? y : x; }
FP_MIN_MAX(int)
FP_MIN_MAX(unsigned)
FP_MIN_MAX(long long)
FP_MIN_MAX(unsigned long long)

// Four signed (or unsigned) bytes by four, added up.
static inline int __dp4a(int x, int y, int sum) {
  unsigned result = (unsigned)sum;
  for (int n = 0; n < 32; n += 8) result += (unsigned)((int8_t)(x >> n) * (int8_t)(y >> n));
  return (int)result;
}
static inline unsigned __dp4a(unsigned x, unsigned y, unsigned sum) {
  for (int n = 0; n < 32; n += 8) sum += (x >> n & 255) * (y >> n & 255);
  return sum;
}
static inline unsigned fp_byte_distances(unsigned x, unsigned y, int sign_bit) {
  unsigned result = 0;
  for (int n = 0; n < 32; n += 8) {
    const int a = (int)((x >> n & 255) ^ sign_bit), b = (int)((y >> n & 255) ^ sign_bit);
    result |= (unsigned)(a < b ? b - a : a - b) << n;
  }
  return result;
}
static inline unsigned __vabsdiffu4(unsigned x, unsigned y) { return fp_byte_distances(x, y, 0); }
static inline unsigned __vabsdiffs4(unsigned x, unsigned y) { return fp_byte_distances(x, y, 128); }
static inline unsigned __vsadu4(unsigned x, unsigned y) {
  return __dp4a(__vabsdiffu4(x, y), 0x01010101u, 0u);
}
static inline unsigned __vsads4(unsigned x, unsigned y) {
  return __dp4a(__vabsdiffs4(x, y), 0x01010101u, 0u);
}
static inline unsigned __vmaxs4(unsigned x, unsigned y) {
  unsigned result = 0;
  for (int n = 0; n < 32; n += 8) {
    const int8_t a = (int8_t)(x >> n), b = (int8_t)(y >> n);
    result |= (unsigned)(uint8_t)(a < b ? b : a) << n;
  }
  return result;
}

#define FP_ATOMIC(T)                                                                             \
  static inline T atomicExch(T* p, T value) { T old = *p; *p = value; return old; }              \
  static inline T atomicCAS(T* p, T expected, T value) {                                         \
    T old = *p;                                                                                  \
    if (old == expected) *p = value;                                                             \
    return old;                                                                                  \
  }                                                                                              \
  static inline T atomicAdd(T* p, T value) { T old = *p; *p = (T)(old + value); return old; }    \
  static inline T atomicMin(T* p, T value) { T old = *p; *p = min(old, value); return old; }     \
  static inline T atomicMax(T* p, T value) { T old = *p; *p = max(old, value); return old; }     \
  static inline T atomicOr(T* p, T value) { T old = *p; *p = old | value; return old; }          \
  static inline T atomicAnd(T* p, T value) { T old = *p; *p = old & value; return old; }
FP_ATOMIC(int)
FP_ATOMIC(unsigned)
FP_ATOMIC(unsigned long long)
static inline float atomicAdd(float* p, float value) { float old = *p; *p = old + value; return old; }

// --- what kernels write as PTX on a device -------------------------------------------------------

namespace simulated {

static inline float half_to_float(unsigned half) {
  const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, rest = half & 1023;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(ldexpf((float)rest, -24)));
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) |
                         rest << 13);
}

static inline float bfloat16_of(unsigned word, int half) {
  return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}

// c + sum of products as tensor cores add: exact products, aligned to the greatest exponent, cut to
// 24 bits, added without rounding, cut again. Fasi, Higham, Mikaitis and Pranesh, "Numerical
// behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021. Newer ones keep a few bits
// more: this is the worst that was seen, so bounds that hold here hold there.
static float tensor_core_sum(float c, const float* x, const float* y, int count) {
  double terms[17] = {c};
  int greatest = -1000;
  double plain = c;
  for (int k = 0; k < count; ++k) plain += terms[k + 1] = (double)x[k] * (double)y[k];
  if (!std::isfinite(plain)) return (float)plain;
  for (int k = 0; k <= count; ++k)
    if (terms[k] != 0) greatest = std::max(greatest, std::ilogb(terms[k]));
  if (greatest == -1000) return 0.0f;
  double sum = 0;
  for (int k = 0; k <= count; ++k) sum += std::trunc(std::ldexp(terms[k], 23 - greatest));
  const int bits = sum == 0 ? 0 : std::ilogb(sum);
  const int dropped = std::max(bits - 23, 0);
  return (float)std::ldexp(std::trunc(std::ldexp(sum, -dropped)), dropped + greatest - 23);
}

struct Fragments { uint32_t a[4], b[2]; float c[4]; };

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 by the fragment layout of the PTX manual:
// with group = lane / 4 and t = lane % 4, register r of a holds row group + 8 (r & 1), columns
// 2 t + 8 (r >> 1) and the next; register r of b rows 2 t + 8 r and the next of column group;
// c and d hold row group + 8 (n >> 1), column 2 t + (n & 1). Sums go in two steps of 8 columns.
static inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     const float (&c)[4], int line) {
  Fragments own;
  memcpy(own.a, a, sizeof a), memcpy(own.b, b, sizeof b), memcpy(own.c, c, sizeof c);
  const Slot* all = meet(0xffffffffu, to_slot(own), line);
  const int group = lane() / 4, t = lane() % 4;
  for (int n = 0; n < 4; ++n) {
    const int low = n >> 1, column = 2 * t + (n & 1);
    float x[16], y[16];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, high = k / 8;
      const Fragments left = from_slot<Fragments>(all[group * 4 + pair]);
      const Fragments right = from_slot<Fragments>(all[column * 4 + pair]);
      x[k] = bfloat16_of(left.a[low + 2 * high], k % 2);
      y[k] = bfloat16_of(right.b[high], k % 2);
    }
    d[n] = tensor_core_sum(tensor_core_sum(own.c[n], x, y, 8), x + 8, y + 8, 8);
  }
}

}  // namespace simulated

#define FP_EXPORT(kernel)                                                                    \
  extern "C" int launch_##kernel(const unsigned* grid, const unsigned* block, void** arguments, \
                                 unsigned seed) {                                            \
    return simulated::launch(#kernel, &kernel, grid, block, arguments, seed);                \
  }                                                                                          \
  extern "C" int signature_##kernel(int* sizes) { return simulated::signature(&kernel, sizes); }
extern "C" const char* fp_message() { return simulated::message; }
