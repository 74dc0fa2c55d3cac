// What all kernels share; it is pasted in front of each of them. No kernel file includes anything.
//
// Every multiply-add is written out as fmaf: devices are compiled with --fmad=false, so that the
// bits are those of the contract (kernels/__init__.py) on any of them. Collectives of a warp take
// its full mask, so whoever calls them first makes sure that all lanes get there.

#define FP_FULL_MASK 0xffffffffu

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef FP_LINK
#define FP_LINK 0
#endif
static __device__ __forceinline__ float apply_link(float raw) {
#if FP_LINK == 0
  return raw;
#else
  const float below = fminf(raw, 0.0f);
#if FP_LINK == 1
  return -sqrtf(-below);
#elif FP_LINK == 2
  return (float)exp((double)below);
#else
  const double t = (double)below;
  return (float)-log1p(-t + sqrt(t * (t - 2.0)));
#endif
#endif
}

// --- keys by which candidates are ranked: greater for a greater value, then for a lower column ----

// float32 as an integer of the same order; -0 and +0 are ties.
static __device__ __forceinline__ u32 ordered(float value) {
  const u32 bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ u64 key_of(float value, u32 column) {
  return (u64)ordered(value) << 32 | (u32)~column;
}

static __device__ __forceinline__ u32 column_of(u64 key) { return ~(u32)key; }

static __device__ __forceinline__ float value_of(u64 key) {
  const u32 bits = (u32)(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
