// Soft lookup: softmax averages over keys, streamed. A block of threads holds a tile of queries, with
// the greatest score, the sum of weights and the sums of weighted values of each so far, and walks the
// keys of a span tile by tile: scores as of all pairs (tile.cuh), their weights, and the product of
// weights and values (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et
// al., FlashAttention, 2022). Spans begin at multiples of their length from the first key on, whatever
// a launch holds, and are combined in their order, so that results do not depend on launches.
//
// A weight is 2^(factor (score - greatest)), score without offset and slope; below 2^-126 it is 0.
// Compiled with FP_OWN_COLUMNS 4 and
//   FP_LINK  the link, as a number of LINKS
//   FP_NEAR  1: where tiles are not near enough to the pair kernel, it decides (pair.cuh)

#define LEAST_EXPONENT (-126.0f)
#define SPACE (COLUMNS * PITCH)                // words: operands of a tile, then its weights
#define LOWEST __uint_as_float(0xff7fffffu)
#define NOTHING __uint_as_float(0xff800000u)   // minus infinity: the score of no key

// What a launch looks up; LOOKUP in gpu_attention.py.
struct Lookup {
  int span;    // keys of a span, whole tiles
  int width;   // columns of values
  float factor;
};

__device__ __forceinline__ float weight_of(float score, float greatest, float factor) {
  const float exponent = (score - greatest) * factor;
  return exponent >= LEAST_EXPONENT ? exp2f(exponent) : 0.0f;  // 0 too where both are infinite
}

// The greatest (or sum) of the 16 threads that hold the same rows; each gets it.
__device__ __forceinline__ float over_row(float value, bool sum) {
#pragma unroll
  for (int apart = 8; apart > 0; apart >>= 1) {
    const float other = __shfl_xor_sync(FP_FULL_MASK, value, apart);
    value = sum ? value + other : fmaxf(value, other);
  }
  return value;
}

// --- scores of a tile ----------------------------------------------------------------------------

// A thread's own numbers, by column: four rows that lie together at a time.
__device__ __forceinline__ void put_own(const float (&values)[8][FP_OWN_COLUMNS], float* space) {
#pragma unroll
  for (int j = 0; j < FP_OWN_COLUMNS; ++j)
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 four;
      four.x = values[i][j]; four.y = values[i + 1][j];
      four.z = values[i + 2][j]; four.w = values[i + 3][j];
      *(float4*)(space + own_column(j) * PITCH + own_row(i)) = four;
    }
}

__device__ __forceinline__ void take_own(float (&values)[8][FP_OWN_COLUMNS], const float* space) {
#pragma unroll
  for (int j = 0; j < FP_OWN_COLUMNS; ++j)
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = *(const float4*)(space + own_column(j) * PITCH + own_row(i));
      values[i][j] = four.x; values[i + 1][j] = four.y;
      values[i + 2][j] = four.z; values[i + 3][j] = four.w;
    }
}

#if FP_NEAR
#define GROUPS (THREADS / FP_LANES)

struct TableRows { const char *left, *right; };

// Whether the pair kernel decides: where a root would magnify a tile's error, and wherever the bound
// of a query's tiles is infinite.
__device__ __forceinline__ bool is_near(float raw, float slack) {
  if (!(slack < -LOWEST)) return true;
#if FP_LINK == 1 || FP_LINK == 3
  return !(raw <= -64.0f * slack);
#else
  return false;
#endif
}

// Put the pair kernel's raw scores where they decide; `space` holds those of the tile.
__device__ __forceinline__ void decide_exactly(
    const TableRows& rows, const float* __restrict__ slacks, const Layout& layout,
    const Constants& constants, const Tiles& t, int row, int column, float* space) {
  const int group = threadIdx.x / FP_LANES;
#pragma unroll 1
  for (int place = group; place < TILE * COLUMNS; place += GROUPS) {
    const int i = place % TILE, j = place / TILE;
    const bool real = row + i < t.left_count && column + j < t.right_count;
    const bool near = real && is_near(space[j * PITCH + i], slacks[row + i]);
    if (!__any_sync(FP_FULL_MASK, near)) continue;
    Lanes lanes = {};
    float bias = 0.0f, scales = 0.0f;
    if (near) {
      const char* left_row = rows.left + (row + i) * layout.row_bytes;
      const char* right_row = rows.right + (column + j) * layout.row_bytes;
      add_terms(lanes, own_part(left_row, right_row), layout);
      load_fields(left_row, right_row, layout, bias, scales);  // last: there are few registers
    }
    const float raw = raw_score(lanes, bias, scales, constants);
    if (near && threadIdx.x % FP_LANES == 0) space[j * PITCH + i] = raw;
  }
}
#endif

// Turn a thread's raw scores into linked ones, and those of no key into `NOTHING`.
__device__ __forceinline__ void finish_scores(
    const Constants& constants, const Tiles& t, int row, int column, float* space,
    float (&scores)[8][FP_OWN_COLUMNS]) {
#if FP_LINK > 0
#pragma unroll 1  // unrolled, links would not fit the registers
  for (int n = 0; n < 8 * FP_OWN_COLUMNS; ++n) {
    float* const own = space + own_column(n >> 3) * PITCH + own_row(n & 7);
    *own = apply_link(*own, constants);
  }
#endif
#if FP_LINK > 0 || FP_NEAR
  take_own(scores, space);
#endif
  const int keys = t.right_count - column;
  const i64 apart = (t.left_first + row) - (t.right_first + column);
  const bool meets = t.one_table && apart > -TILE && apart < COLUMNS;
  if (keys >= COLUMNS && !meets) return;
  const int itself = meets ? (int)apart : COLUMNS;  // column less row of a query and itself
#pragma unroll
  for (int j = 0; j < FP_OWN_COLUMNS; ++j)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (own_column(j) >= keys || own_column(j) - own_row(i) == itself) scores[i][j] = NOTHING;
}

// --- values --------------------------------------------------------------------------------------

// STEP keys' values in COLUMNS columns from `first` on, zeros past the end.
__device__ __forceinline__ void bring_values(
    const float* __restrict__ values, int key, int stop, int first, int width, float* shared) {
  const int k = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
  const float* own = values + (i64)(key + k) * width + first + column;
  const bool real = first + column < width;
#pragma unroll
  for (int n = 0; n < STEP; n += THREADS / COLUMNS) {
    shared[(k + n) * COLUMN_PITCH + column] = real && key + k + n < stop ? __ldg(own) : 0.0f;
    own += THREADS / COLUMNS * width;
  }
}

// --- a span --------------------------------------------------------------------------------------

// A tile of queries with some columns of values, and span y of keys: what `combine_spans` adds up,
// (spans, queries) greatest scores and sums, (spans, queries, width) outputs. Without a key LOWEST
// and 0.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attend(const u32* __restrict__ left, const float* __restrict__ left_bias,
       const u32* __restrict__ right, const float* __restrict__ right_bias, Tiles t,
       const char* __restrict__ left_rows, const char* __restrict__ right_rows,
       const float* __restrict__ slacks, Layout layout, Constants constants,
       const float* __restrict__ values, Lookup lookup, float* __restrict__ greatest,
       float* __restrict__ sums, float* __restrict__ outputs) {
  __shared__ uint4 aligned_space[SPACE / 4];
  __shared__ uint4 aligned_values[STEP * COLUMN_PITCH / 4];
  float* const space = (float*)aligned_space;
  float* const some = (float*)aligned_values;
  const int row = blockIdx.x % t.row_tiles * TILE, first = blockIdx.x / t.row_tiles * COLUMNS;
  const int start = blockIdx.y * lookup.span;
  const int stop = t.right_count - start < lookup.span ? t.right_count : start + lookup.span;
  __shared__ float most[TILE], total[TILE];  // in registers they would be too many
  if (threadIdx.x < TILE) most[threadIdx.x] = LOWEST, total[threadIdx.x] = 0.0f;
#if FP_NEAR
  __shared__ Layout shared_layout;  // what is derived from it is not kept in registers either
  if (threadIdx.x == 0) shared_layout = layout;
#endif
  __syncthreads();
  float output[8][FP_OWN_COLUMNS];
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < FP_OWN_COLUMNS; ++j) output[i][j] = 0.0f;
#pragma unroll 1
  for (int key = start; key < stop; key += COLUMNS) {
    float scores[8][FP_OWN_COLUMNS];
    sum_tile(left, left_bias, right, right_bias, t, row, key, (u32*)space, scores);
#if FP_LINK > 0 || FP_NEAR
    put_own(scores, space);
#endif
#if FP_NEAR
    __syncthreads();
    const TableRows rows = {left_rows, right_rows};
    decide_exactly(rows, slacks, shared_layout, constants, t, row, key, space);
    __syncthreads();
#endif
    finish_scores(constants, t, row, key, space, scores);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int own = own_row(i);
      const float earlier = most[own];
      float now = earlier;
#pragma unroll
      for (int j = 0; j < FP_OWN_COLUMNS; ++j) now = fmaxf(now, scores[i][j]);
      now = over_row(now, false);
      const float before = weight_of(earlier, now, lookup.factor);  // what was counts so much now
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < FP_OWN_COLUMNS; ++j) {
        scores[i][j] = weight_of(scores[i][j], now, lookup.factor);
        sum += scores[i][j];
        output[i][j] *= before;
      }
      sum = over_row(sum, true);
      __syncwarp();  // all threads of the row have read what one of them writes
      if ((threadIdx.x & 15) == 0) {
        total[own] = fmaf(total[own], before, sum);
        most[own] = now;
      }
    }
    put_own(scores, space);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < FP_OWN_COLUMNS; ++j) scores[i][j] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < COLUMNS; k += STEP) {
      bring_values(values, key + k, stop, first, lookup.width, some);
      __syncthreads();
      add_products(space + k * PITCH, some, scores);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < FP_OWN_COLUMNS; ++j) output[i][j] += scores[i][j];
  }
  const i64 begin = (i64)blockIdx.y * t.left_count;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int here = row + own_row(i);
    if (here >= t.left_count) continue;
    if (first == 0 && (threadIdx.x & 15) == 0) {
      greatest[begin + here] = most[own_row(i)];
      sums[begin + here] = total[own_row(i)];
    }
    float* const own = outputs + (begin + here) * lookup.width + first;
#pragma unroll
    for (int j = 0; j < FP_OWN_COLUMNS; ++j)
      if (first + own_column(j) < lookup.width) own[own_column(j)] = output[i][j];
  }
}

// --- spans together ------------------------------------------------------------------------------

// Add spans, in order, to what was before them; a warp a query. `begin`: nothing was.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
combine_spans(const float* __restrict__ greatest, const float* __restrict__ sums,
              const float* __restrict__ outputs, int spans, i64 queries, Lookup lookup, int begin,
              float* __restrict__ all_greatest, float* __restrict__ all_sums,
              float* __restrict__ all_outputs) {
  const i64 query = ((i64)blockIdx.x * THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x & 31;
  if (query >= queries) return;  // whole warps
  const float before = begin ? LOWEST : all_greatest[query];
  const float total_before = begin ? 0.0f : all_sums[query];
  __syncwarp();                  // all lanes have read what lane 0 writes
  for (int column = lane; column < lookup.width; column += 32) {
    const i64 place = query * lookup.width + column;
    float most = before, total = total_before;
    float output = begin ? 0.0f : all_outputs[place];
    for (int span = 0; span < spans; ++span) {
      const i64 own = span * queries + query;
      const float now = fmaxf(most, greatest[own]);
      const float old = weight_of(most, now, lookup.factor);
      const float scale = weight_of(greatest[own], now, lookup.factor);
      total = fmaf(total, old, sums[own] * scale);
      output = fmaf(output, old, outputs[own * lookup.width + column] * scale);
      most = now;
    }
    all_outputs[place] = output;
    if (column == 0) {
      all_greatest[query] = most;
      all_sums[query] = total;
    }
  }
}

// Turn sums of weighted values into means, times `scale`; NaN where a query has no key.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
finish_means(const float* __restrict__ sums, float* __restrict__ outputs, i64 queries, int width,
             float scale) {
  const i64 place = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (place >= queries * width) return;
  const float sum = sums[place / width];
  outputs[place] = sum > 0.0f ? outputs[place] / sum * scale : not_a_number();
}
