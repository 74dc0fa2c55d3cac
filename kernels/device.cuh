// What all kernels share; it is pasted in front of each of them. No kernel file includes anything.
//
// Every multiply-add is written out as fmaf: devices are compiled with --fmad=false, so that the
// bits are those of the contract (kernels/__init__.py) on any of them. Collectives of a warp take
// its full mask: all lanes get to each of them. FP_HOST: the sources are built for tests on a CPU.

#define FP_FULL_MASK 0xffffffffu

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// How a row lies in memory; LAYOUT in gpu.py.
struct Layout {
  int runs[10];           // vectors of 16 columns: plus and minus of each segment
  int bias_at, scale_at;  // bytes into the row, or -1
  i64 row_bytes;
};

// The plan's numbers; CONSTANTS in gpu.py.
struct Constants {
  float constant, slope, offset;
  float scales[5];  // of int8 segments
};

#ifndef FP_LINK  // place in LINKS: a choice at run time would cost registers in every kernel
#define FP_LINK 0
#endif

// offset + slope * link(raw), in float32; exp and log1p in float64, rounded once.
__device__ __forceinline__ float apply_link(float raw, const Constants& constants) {
  float value = raw;
#if FP_LINK > 0
  const float below = fminf(raw, 0.0f);
#if FP_LINK == 1
  value = -sqrtf(-below);
#elif FP_LINK == 2
  value = (float)exp((double)below);
#else
  const double t = (double)below;
  value = (float)-log1p(-t + sqrt(t * (t - 2.0)));
#endif
#endif
  return constants.offset + constants.slope * value;
}

__device__ __forceinline__ float load_float(const char* where) {
  return __ldg((const float*)where);
}

__device__ __forceinline__ uint4 load_16_bytes(const char* where) {
  return __ldg((const uint4*)where);
}

// The n-th of row numbers that have 4 or 8 bytes each.
__device__ __forceinline__ i64 load_number(const char* numbers, i64 n, int bytes) {
  if (bytes == 4) return __ldg((const int*)numbers + n);
  return __ldg((const i64*)numbers + n);
}

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// --- keys by which candidates are ranked: greater for a greater value, then for a lower column

// float32 as an integer of the same order; -0 and +0 are ties.
__device__ __forceinline__ u32 ordered(float value) {
  const u32 bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 key_of(float value, u32 column) {
  return (u64)ordered(value) << 32 | (u32)~column;
}

__device__ __forceinline__ u32 column_of(u64 key) { return ~(u32)key; }

__device__ __forceinline__ float value_of(u64 key) {
  const u32 bits = (u32)(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
