// The raw score of a pair of rows: the bits of the contract (kernels/__init__.py) for the natural group.
//
// A group of FP_LANES threads scores a pair; each reads 16 bytes of a row at a time. The natural
// group reads one vector of 16 columns: each thread owns some of its lanes. Wider groups read
// several vectors at a time and add their lanes at the end: other bits, within the stated bound.
// int8 sums are exact integers, so there every group gives the same bits.
//
// FP_PRECISION      0 float32, 1 float16, 2 bfloat16, 3 int8
// FP_LANES          threads of a pair
// FP_PRODUCTS_ONLY  1: rows hold nothing but products

#if FP_PRECISION == 0
#define FP_COLUMNS 4  // in 16 bytes
#elif FP_PRECISION == 3
#define FP_COLUMNS 16
#else
#define FP_COLUMNS 8
#endif
#define FP_NATURAL (16 / FP_COLUMNS)
#define FP_SUBGROUPS (FP_LANES / FP_NATURAL)
#define FP_VECTOR_BYTES (16 * FP_NATURAL)
#ifndef FP_UNROLL
#define FP_UNROLL (FP_PRODUCTS_ONLY ? 4 : 2)  // vectors that are asked for together
#endif

// What a thread reads of a pair: both rows from its own first 16 bytes on.
struct Rows {
  const char *left, *right;
  int subgroup;
};

// The first vector of a minus run that a subgroup takes: it goes on where the plus run ends.
__device__ __forceinline__ int first_of_minus(const Rows& rows, int plus) {
  return (rows.subgroup + FP_SUBGROUPS - plus % FP_SUBGROUPS) % FP_SUBGROUPS;
}

// --- float columns -------------------------------------------------------------------------------

#if FP_PRECISION < 3

struct Lanes { float sums[FP_COLUMNS]; };

__device__ __forceinline__ void widen_two(u32 word, float& low, float& high) {
#if FP_PRECISION == 2
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
#elif FP_PRECISION == 1 && defined(FP_HOST)
  low = simulated::half_to_float(word & 0xffffu);
  high = simulated::half_to_float(word >> 16);
#elif FP_PRECISION == 1
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high) : "r"(word));
#endif
}

__device__ __forceinline__ void widen(const uint4& stored, float (&columns)[FP_COLUMNS]) {
  const u32 words[4] = {stored.x, stored.y, stored.z, stored.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#if FP_PRECISION == 0
    columns[n] = __uint_as_float(words[n]);
#else
    widen_two(words[n], columns[2 * n], columns[2 * n + 1]);
#endif
  }
}

__device__ __forceinline__ void load_columns(const char* where, float (&columns)[FP_COLUMNS]) {
  widen(load_16_bytes(where), columns);
}

// Adds the terms of one run that starts `at` bytes into the rows: vectors from `first` on.
template <int SEGMENT, bool MINUS>
__device__ __forceinline__ void add_run(Lanes& lanes, const Rows& rows, int at, int first,
                                        int vectors) {
  const int half = vectors * FP_VECTOR_BYTES;
#pragma unroll FP_UNROLL
  for (int vector = first; vector < vectors; vector += FP_SUBGROUPS) {
    const char* left = rows.left + at + vector * FP_VECTOR_BYTES;
    const char* right = rows.right + at + vector * FP_VECTOR_BYTES;
    float l[FP_COLUMNS], r[FP_COLUMNS], other_l[FP_COLUMNS], other_r[FP_COLUMNS];
    load_columns(left, l);
    load_columns(right, r);
    if (SEGMENT == 2) {
      load_columns(left + half, other_l);
      load_columns(right + half, other_r);
    }
#pragma unroll
    for (int n = 0; n < FP_COLUMNS; ++n) {
      float& lane = lanes.sums[n];
      float term;
      if (SEGMENT == 0) {
        lane = fmaf(MINUS ? -l[n] : l[n], r[n], lane);
        continue;
      }
      if (SEGMENT == 4) {
        const float apart = l[n] - r[n];
        lane = fmaf(MINUS ? -apart : apart, apart, lane);
        continue;
      }
      if (SEGMENT == 1) term = fmaxf(l[n], r[n]);
      if (SEGMENT == 2) term = fmaxf(l[n], other_r[n]) + fmaxf(other_l[n], r[n]);
      if (SEGMENT == 3) term = fabsf(l[n] - r[n]);
      lane = MINUS ? lane - term : lane + term;
    }
  }
}

template <int SEGMENT>
__device__ __forceinline__ void add_segment(Lanes& lanes, const Rows& rows, const Layout& layout,
                                            int& at) {
  const int bytes = (SEGMENT == 2 ? 2 : 1) * FP_VECTOR_BYTES;
  const int plus = layout.runs[2 * SEGMENT], minus = layout.runs[2 * SEGMENT + 1];
  add_run<SEGMENT, false>(lanes, rows, at, rows.subgroup, plus);
  at += plus * bytes;
  add_run<SEGMENT, true>(lanes, rows, at, first_of_minus(rows, plus), minus);
  at += minus * bytes;
}

__device__ __forceinline__ void add_terms(Lanes& lanes, const Rows& rows, const Layout& layout) {
  int at = 0;
  add_segment<0>(lanes, rows, layout, at);
#if !FP_PRODUCTS_ONLY
  add_segment<1>(lanes, rows, layout, at);
  add_segment<2>(lanes, rows, layout, at);
  add_segment<3>(lanes, rows, layout, at);
  add_segment<4>(lanes, rows, layout, at);
#endif
}

// The sum of the lanes of a group: those of its subgroups are added, then lane q with q + 8,
// q + 4, q + 2, q + 1. Every thread gets it.
__device__ __forceinline__ float total(Lanes& lanes) {
#pragma unroll
  for (int n = 0; n < FP_COLUMNS; ++n) {
    float& lane = lanes.sums[n];
#pragma unroll
    for (int apart = FP_NATURAL; apart < FP_LANES; apart *= 2)
      lane += __shfl_xor_sync(FP_FULL_MASK, lane, apart);
#pragma unroll
    for (int apart = FP_NATURAL / 2; apart > 0; apart /= 2)
      lane += __shfl_xor_sync(FP_FULL_MASK, lane, apart);
  }
#pragma unroll
  for (int width = FP_COLUMNS / 2; width > 0; width /= 2)
#pragma unroll
    for (int n = 0; n < width; ++n) lanes.sums[n] += lanes.sums[n + width];
  return lanes.sums[0];
}

__device__ __forceinline__ float weigh(Lanes& lanes, const Constants&, float) {
  return total(lanes);
}

// Turns the signs of 16 bytes of columns of a minus run.
__device__ __forceinline__ void negate(uint4& stored) {
  const u32 signs = FP_PRECISION == 0 ? 0x80000000u : 0x80008000u;
  stored.x ^= signs, stored.y ^= signs, stored.z ^= signs, stored.w ^= signs;
}

__device__ __forceinline__ void add_products(Lanes& lanes, const uint4& left, const uint4& right,
                                             bool) {
  float l[FP_COLUMNS], r[FP_COLUMNS];
  widen(left, l);
  widen(right, r);
#pragma unroll
  for (int n = 0; n < FP_COLUMNS; ++n) lanes.sums[n] = fmaf(l[n], r[n], lanes.sums[n]);
}

// --- int8 columns --------------------------------------------------------------------------------

#else

// Sums of the five segments; up to 32768 columns of one sign they fit into int32.
struct Lanes { int sums[5]; };

__device__ __forceinline__ void load_words(const char* where, u32 (&words)[4]) {
  const uint4 stored = load_16_bytes(where);
  words[0] = stored.x, words[1] = stored.y, words[2] = stored.z, words[3] = stored.w;
}

__device__ __forceinline__ int add_dot(u32 x, u32 y, int sum) {
  return __dp4a((int)x, (int)y, sum);
}

// Sum of |x - y| of four bytes: adding 128 to signed ones keeps their distances.
__device__ __forceinline__ int distances(u32 x, u32 y) {
  return (int)__vsadu4(x ^ 0x80808080u, y ^ 0x80808080u);
}

// Twice the sum of max(x, y) of four bytes: x + y + |x - y|.
__device__ __forceinline__ int add_maxima(u32 x, u32 y, int sum) {
  return add_dot(x, 0x01010101u, add_dot(y, 0x01010101u, sum)) + distances(x, y);
}

// Sum of the terms of one run, as in add_run: integers alone, no column is converted.
template <int SEGMENT>
__device__ __forceinline__ int run_sum(const Rows& rows, int at, int first, int vectors) {
  const int half = vectors * FP_VECTOR_BYTES;
  int sum = 0;
#pragma unroll FP_UNROLL
  for (int vector = first; vector < vectors; vector += FP_SUBGROUPS) {
    const char* left = rows.left + at + vector * FP_VECTOR_BYTES;
    const char* right = rows.right + at + vector * FP_VECTOR_BYTES;
    u32 l[4], r[4], other_l[4], other_r[4];
    load_words(left, l);
    load_words(right, r);
    if (SEGMENT == 2) {
      load_words(left + half, other_l);
      load_words(right + half, other_r);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (SEGMENT == 0) sum = add_dot(l[n], r[n], sum);
      if (SEGMENT == 1) sum = add_maxima(l[n], r[n], sum);
      if (SEGMENT == 2) sum = add_maxima(l[n], other_r[n], add_maxima(other_l[n], r[n], sum));
      if (SEGMENT == 3) sum += distances(l[n], r[n]);
      if (SEGMENT == 4) {  // (x - y)^2 = x^2 + y^2 - 2 x y; what is on the way may wrap around
        const u32 squares = (u32)add_dot(l[n], l[n], add_dot(r[n], r[n], sum));
        sum = (int)(squares - 2u * (u32)add_dot(l[n], r[n], 0));
      }
    }
  }
  return SEGMENT == 1 || SEGMENT == 2 ? sum / 2 : sum;
}

template <int SEGMENT>
__device__ __forceinline__ void add_segment(Lanes& lanes, const Rows& rows, const Layout& layout,
                                            int& at) {
  const int bytes = (SEGMENT == 2 ? 2 : 1) * FP_VECTOR_BYTES;
  const int plus = layout.runs[2 * SEGMENT], minus = layout.runs[2 * SEGMENT + 1];
  lanes.sums[SEGMENT] = run_sum<SEGMENT>(rows, at, rows.subgroup, plus);
  at += plus * bytes;
  lanes.sums[SEGMENT] -= run_sum<SEGMENT>(rows, at, first_of_minus(rows, plus), minus);
  at += minus * bytes;
}

__device__ __forceinline__ void add_terms(Lanes& lanes, const Rows& rows, const Layout& layout) {
  int at = 0;
  add_segment<0>(lanes, rows, layout, at);
#if !FP_PRODUCTS_ONLY
  add_segment<1>(lanes, rows, layout, at);
  add_segment<2>(lanes, rows, layout, at);
  add_segment<3>(lanes, rows, layout, at);
  add_segment<4>(lanes, rows, layout, at);
#endif
}

// The segments of a group added up, each times its scale; `scales` is that of the products.
__device__ __forceinline__ float weigh(Lanes& lanes, const Constants& constants, float scales) {
  float result = 0.0f;
#pragma unroll
  for (int segment = 0; segment < (FP_PRODUCTS_ONLY ? 1 : 5); ++segment) {
    int sum = lanes.sums[segment];
#pragma unroll
    for (int apart = FP_LANES / 2; apart > 0; apart /= 2)
      sum += __shfl_xor_sync(FP_FULL_MASK, sum, apart);
    float scale = segment == 0 ? scales : constants.scales[segment];
    if (segment == 4) scale = scale * scale;
    result = result + (float)sum * scale;
  }
  return result;
}

__device__ __forceinline__ void negate(uint4&) {}  // -128 has no negative

__device__ __forceinline__ void add_products(Lanes& lanes, const uint4& left, const uint4& right,
                                             bool minus) {
  int sum = add_dot(left.x, right.x, add_dot(left.y, right.y, 0));
  sum = add_dot(left.z, right.z, add_dot(left.w, right.w, sum));
  lanes.sums[0] += minus ? -sum : sum;
}

#endif

// --- a pair --------------------------------------------------------------------------------------

// The sum of both biases and the product of both scales, where rows have them.
__device__ __forceinline__ void load_fields(const char* left_row, const char* right_row,
                                            const Layout& layout, float& bias, float& scales) {
  if (layout.bias_at >= 0)
    bias = load_float(left_row + layout.bias_at) + load_float(right_row + layout.bias_at);
  if (FP_PRECISION == 3 && layout.scale_at >= 0)
    scales = load_float(left_row + layout.scale_at) * load_float(right_row + layout.scale_at);
}

// What a thread of a group reads of a pair.
__device__ __forceinline__ Rows own_part(const char* left_row, const char* right_row) {
  const int lane = threadIdx.x % FP_LANES, own = lane % FP_NATURAL * 16;
  return {left_row + own, right_row + own, lane / FP_NATURAL};
}

// The raw score of what a group has added up; all threads of the warp take part.
__device__ __forceinline__ float raw_score(Lanes& lanes, float bias, float scales,
                                           const Constants& constants) {
  return (constants.constant + bias) + weigh(lanes, constants, scales);
}
