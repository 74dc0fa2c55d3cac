// Keys by which candidates are ranked: greater for a greater value, then for a lower column.

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
