// All pairs: raw scores of 128 left rows against 128 right rows in the registers of a block, and
// what becomes of them before they are gone. Compiled with
//   FP_FORM  0 products of float32, one chain of fmaf over the columns in order, the bits of the
//              CPU's tile; 1 products of bfloat16 by tensor cores
//   FP_KEEP  0 dense: scores are written; 1 hits: pairs that reach a floor are listed; 2 best: pairs
//              above the floor of their row become its candidates; 3 the range of all raw scores;
//              4 a histogram of them
//   FP_LINK  the link, as a number of LINKS; only dense scores go through it
// Operands are those of operands.py, rows one after another: product columns (bfloat16: two a word),
// then maxima to add, then maxima to subtract, each kind a multiple of 16 columns.

#define TILE 128
#define THREADS 256
#define STEP 16                  // float32 columns, or words of two bfloat16, brought in together
#define PITCH (TILE + 4)         // float32 of a column of a tile in shared memory
#define WORD_PITCH (STEP + 4)    // words of a row: lanes of a fragment then meet different banks
#define STRIP 16                 // row tiles that are walked together, so that columns are read once
#define SPACE (32 * THREADS)     // words of shared memory: operands, then half of the values
#define SHARED_BINS 1024

struct Tiles {                   // what a launch walks; by value
  i64 left_first, right_first;   // table rows of its first left and right row: what a pair is called
  int left_start, right_start;   // the same in the tables on the device: what lists of pairs hold
  int left_count, right_count;
  int row_words, products, plus, minus;  // words of a row in all and of each kind
  int row_tiles, column_tiles;
  int one_table;                 // 0 two tables; 1 one: the diagonal is left out; 2 only columns > row
  float constant;
};

// Pairs that someone else must look at; the count goes on where there is no more room.
struct List {
  int* rows;
  int* columns;
  u64* count;
  u64 capacity;
};

#define LIST int *__restrict__ list_rows, int *__restrict__ list_columns, \
      u64 *__restrict__ list_count, u64 list_capacity
#define MAKE_LIST const List list = {list_rows, list_columns, list_count, list_capacity};

// --- which pairs a thread holds ------------------------------------------------------------------

// A thread holds 8 rows times 8 columns of the tile.
__device__ __forceinline__ int own_row(int i) {
#if FP_FORM == 1                 // the accumulators of 4 x 4 fragments of 16 rows and 8 columns
  return (threadIdx.x >> 7) * 64 + (i >> 1) * 16 + (i & 1) * 8 + ((threadIdx.x & 31) >> 2);
#else
  return (i >> 2) * 64 + (threadIdx.x >> 4) * 4 + (i & 3);
#endif
}

__device__ __forceinline__ int own_column(int j) {
#if FP_FORM == 1
  return ((threadIdx.x >> 5) & 3) * 32 + (j >> 1) * 8 + (threadIdx.x & 3) * 2 + (j & 1);
#else
  return (j >> 2) * 64 + (threadIdx.x & 15) * 4 + (j & 3);
#endif
}

// Numbers of a thread's 8 rows (or columns) of one column of operands in shared memory.
__device__ __forceinline__ void own_values(const float* column, bool rows, float* values) {
#if FP_FORM == 1
#pragma unroll
  for (int n = 0; n < 8; ++n) values[n] = column[rows ? own_row(n) : own_column(n)];
#else
#pragma unroll
  for (int n = 0; n < 8; n += 4) {
    const float4 four = *(const float4*)(column + (rows ? own_row(n) : own_column(n)));
    values[n] = four.x; values[n + 1] = four.y; values[n + 2] = four.z; values[n + 3] = four.w;
  }
#endif
}

// --- operands into shared memory -----------------------------------------------------------------

// STEP columns of float32 of TILE rows, turned: shared[column][row]. Rows past the end are zero.
__device__ __forceinline__ void bring_columns(
    const u32* __restrict__ words, int first, int count, int row_words, int column,
    float* shared) {
#pragma unroll
  for (int n = 0; n < TILE * STEP / 4 / THREADS; ++n) {
    const int place = threadIdx.x + n * THREADS, row = place >> 2, four = (place & 3) * 4;
    uint4 piece = {0, 0, 0, 0};
    if (first + row < count)
      piece = __ldg((const uint4*)(words + (i64)(first + row) * row_words + column + four));
    shared[(four + 0) * PITCH + row] = __uint_as_float(piece.x);
    shared[(four + 1) * PITCH + row] = __uint_as_float(piece.y);
    shared[(four + 2) * PITCH + row] = __uint_as_float(piece.z);
    shared[(four + 3) * PITCH + row] = __uint_as_float(piece.w);
  }
}

#if FP_FORM == 1
// sums += a b of one fragment of 16 x 16 and one of 16 x 8 bfloat16: c is that of rows g and g + 8.
__device__ __forceinline__ void add_products_of_bfloat16(
    float& c0, float& c1, float& c2, float& c3, const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef FP_HOST
  const float c[4] = {c0, c1, c2, c3};
  float d[4];
  simulated::mma_m16n8k16_bf16(d, a, b, c, __LINE__);
  c0 = d[0]; c1 = d[1]; c2 = d[2]; c3 = d[3];
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// STEP words of bfloat16 of TILE rows as they lie; words past the products are zero.
__device__ __forceinline__ void bring_words(
    const u32* __restrict__ words, int first, int count, int row_words, int word, int products,
    u32* shared) {
#pragma unroll
  for (int n = 0; n < TILE * STEP / 4 / THREADS; ++n) {
    const int place = threadIdx.x + n * THREADS, row = place >> 2, four = (place & 3) * 4;
    uint4 piece = {0, 0, 0, 0};
    if (first + row < count && word + four < products)
      piece = __ldg((const uint4*)(words + (i64)(first + row) * row_words + word + four));
    *(uint4*)(shared + row * WORD_PITCH + four) = piece;
  }
}

// Add the products of 32 columns: 2 x 4 x 4 matrix instructions a warp.
__device__ __forceinline__ void add_fragments(
    const u32* left, const u32* right, float (&sums)[8][8]) {
  const int lane = threadIdx.x & 31, group = lane >> 2, member = lane & 3;
  const u32* own = left + ((threadIdx.x >> 7) * 64 + group) * WORD_PITCH + member;
  const u32* other = right + (((threadIdx.x >> 5) & 3) * 32 + group) * WORD_PITCH + member;
#pragma unroll
  for (int half = 0; half < STEP; half += 8) {
    u32 b[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      b[n][0] = other[n * 8 * WORD_PITCH + half];
      b[n][1] = other[n * 8 * WORD_PITCH + half + 4];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      u32 a[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        a[n] = own[(m * 16 + (n & 1) * 8) * WORD_PITCH + half + (n >> 1) * 4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        add_products_of_bfloat16(
            sums[2 * m][2 * n], sums[2 * m][2 * n + 1], sums[2 * m + 1][2 * n],
            sums[2 * m + 1][2 * n + 1], a, b[n]);
    }
  }
}
#endif

// --- sums ----------------------------------------------------------------------------------------

#if FP_FORM == 0
__device__ __forceinline__ void add_products(
    const float* left, const float* right, float (&sums)[8][8]) {
#pragma unroll 2  // more of them would want more registers than there are
  for (int k = 0; k < STEP; ++k) {
    float x[8], y[8];
    own_values(left + k * PITCH, true, x);
    own_values(right + k * PITCH, false, y);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
  }
}
#endif

// Two columns at a time, whose maxima are added first: a pair then has the same bits both ways
// round, where mirrored halves lie side by side.
__device__ __forceinline__ void add_maxima(
    const float* left, const float* right, bool plus, float (&sums)[8][8]) {
#pragma unroll 1
  for (int k = 0; k < STEP; k += 2) {
    float y[2][8];
    own_values(right + k * PITCH, false, y[0]);
    own_values(right + (k + 1) * PITCH, false, y[1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // one row at a time: all of them do not fit the registers
      const float x = left[k * PITCH + own_row(i)], next = left[(k + 1) * PITCH + own_row(i)];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float pair = fmaxf(x, y[0][j]) + fmaxf(next, y[1][j]);
        sums[i][j] = plus ? sums[i][j] + pair : sums[i][j] - pair;
      }
    }
  }
}

__device__ __forceinline__ void sum_tile(
    const u32* __restrict__ left, const float* __restrict__ left_bias,
    const u32* __restrict__ right, const float* __restrict__ right_bias, const Tiles& t,
    int row, int column, u32* space, float (&sums)[8][8]) {
  float* lefts = (float*)space;
  float* rights = lefts + STEP * PITCH;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int here = column + own_column(j);
    const float bias = here < t.right_count ? right_bias[here] : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i][j] = bias;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int here = row + own_row(i);
    const float bias = here < t.left_count ? left_bias[here] : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[i][j] = (bias + sums[i][j]) + t.constant;
  }
#pragma unroll 1
  for (int word = 0; word < t.products; word += STEP) {
#if FP_FORM == 1
    u32* others = space + TILE * WORD_PITCH;
    bring_words(left, row, t.left_count, t.row_words, word, t.products, space);
    bring_words(right, column, t.right_count, t.row_words, word, t.products, others);
    __syncthreads();
    add_fragments(space, others, sums);
#else
    bring_columns(left, row, t.left_count, t.row_words, word, lefts);
    bring_columns(right, column, t.right_count, t.row_words, word, rights);
    __syncthreads();
    add_products(lefts, rights, sums);
#endif
    __syncthreads();
  }
#pragma unroll 1
  for (int word = t.products; word < t.row_words; word += STEP) {
    bring_columns(left, row, t.left_count, t.row_words, word, lefts);
    bring_columns(right, column, t.right_count, t.row_words, word, rights);
    __syncthreads();
    if (word < t.products + t.plus)
      add_maxima(lefts, rights, true, sums);
    else
      add_maxima(lefts, rights, false, sums);
    __syncthreads();
  }
}

// --- what becomes of a tile ----------------------------------------------------------------------

// First row and column of this block's tile. Row tiles are taken in strips, all rows of a strip for
// one column before the next, so that blocks that run together share what they read.
__device__ __forceinline__ void find_tile(const Tiles& t, int& row, int& column) {
  const int strip = blockIdx.x / (STRIP * t.column_tiles);
  const int within = blockIdx.x - strip * STRIP * t.column_tiles;
  const int left = t.row_tiles - strip * STRIP, height = left < STRIP ? left : STRIP;
  column = within / height * TILE;
  row = (strip * STRIP + within % height) * TILE;
}

// Whether a triangle has no pair in a tile. The same for all threads of a block.
__device__ __forceinline__ bool no_pair_wanted(const Tiles& t, int row, int column) {
  return t.one_table == 2 && t.right_first + column + TILE - 1 < t.left_first + row;
}

// Whether a pair counts: it is real, and of one table, as the launch wants it.
__device__ __forceinline__ bool wanted(const Tiles& t, int row, int column) {
  if (row >= t.left_count || column >= t.right_count) return false;
  const i64 apart = (t.right_first + column) - (t.left_first + row);
  return t.one_table == 0 || (t.one_table == 1 ? apart != 0 : apart > 0);
}

#if FP_KEEP == 0 || FP_KEEP == 1 || FP_KEEP == 4
__device__ __forceinline__ void append(const List& list, u64 at, int row, int column) {
  if (at >= list.capacity) return;
  list.rows[at] = row;
  list.columns[at] = column;
}
#endif

// Call ``use(row, column, value)`` for a thread's pairs, both within the tile. Unrolled 64 times, what
// becomes of a value would not fit the registers: here values wait in the thread's own places of
// shared memory, half of them at a time.
template <class Use>
__device__ __forceinline__ void for_own_pairs(
    const float (&sums)[8][8], u32* space, Use use) {
  float* own = (float*)space + threadIdx.x;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < 32; ++n)
      own[n * THREADS] = half ? sums[4 + n / 8][n % 8] : sums[n / 8][n % 8];
#pragma unroll 1
    for (int n = 0; n < 32; ++n)
      use(own_row(half * 4 + (n >> 3)), own_column(n & 7), own[n * THREADS]);
  }
}

#define SIDES \
  const u32 *__restrict__ left, const float *__restrict__ left_bias, \
      const u32 *__restrict__ right, const float *__restrict__ right_bias, Tiles t

#define BEGIN_TILE \
  int row, column; \
  find_tile(t, row, column); \
  if (no_pair_wanted(t, row, column)) return; \
  __shared__ uint4 aligned_space[SPACE / 4]; \
  u32* const space = (u32*)aligned_space; \
  float sums[8][8]; \
  sum_tile(left, left_bias, right, right_bias, t, row, column, space, sums);

#if FP_KEEP == 0
// Dense: scores[row * pitch + column], both as on the device. In a triangle each value is written at
// both places, and the diagonal is wanted. Where a root would magnify a tile's error, pairs are listed as well: raw
// scores within 64 times the slack of their row or column of 0.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
walk_tiles(SIDES, const float* __restrict__ left_slack, const float* __restrict__ right_slack,
           Constants constants, float* __restrict__ scores, i64 pitch, LIST) {
  MAKE_LIST
  BEGIN_TILE
  for_own_pairs(sums, space, [&](int i, int j, float raw) {
    const int r = row + i, c = column + j;
    const i64 apart = (t.right_first + c) - (t.left_first + r);
    if (r >= t.left_count || c >= t.right_count || (t.one_table == 2 && apart < 0)) return;
    const float score = apply_link(raw, constants);
    const i64 own = t.left_start + r, other = t.right_start + c;
    scores[own * pitch + other] = score;
    if (t.one_table == 2) scores[other * pitch + own] = score;
#if FP_LINK == 1 || FP_LINK == 3
    if (raw > -64.0f * fmaxf(left_slack[r], right_slack[c]))
      append(list, atomicAdd(list.count, (u64)1), t.left_start + r, t.right_start + c);
#endif
  });
}
#endif

#if FP_KEEP == 1
// Hits: pairs whose value reaches the floor.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
walk_tiles(SIDES, float floor, LIST) {
  MAKE_LIST
  BEGIN_TILE
  bool some = false;
#pragma unroll
  for (int n = 0; n < 64; ++n) some |= sums[n / 8][n % 8] >= floor;
  if (!some) return;
  for_own_pairs(sums, space, [&](int i, int j, float value) {
    if (value >= floor && wanted(t, row + i, column + j))
      append(list, atomicAdd(list.count, (u64)1), t.left_start + row + i, t.right_start + column + j);
  });
}
#endif

#if FP_KEEP == 2
// Best: keys of pairs above the floor of their row, the greatest first (`key_of`), are appended to
// the row's own; counts go on where there is no more room, and `overflow` says so. In a triangle
// the pair is offered to the row of its column as well; `floors`, `counts` and `keys` (rows,
// capacity) then are those of all rows.
__device__ __forceinline__ void offer(
    u32* counts, u64* keys, int capacity, u32* overflow, i64 row, float value, i64 column) {
  const u32 at = atomicAdd(&counts[row], 1u);
  if (at < (u32)capacity) keys[row * capacity + at] = key_of(value, (u32)column);
  else atomicMax(overflow, 1u);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
walk_tiles(SIDES, const float* __restrict__ floors, u32* __restrict__ counts,
          u64* __restrict__ keys, int capacity, u32* __restrict__ overflow) {
  BEGIN_TILE
  bool some = false;
  const float* own_floors = floors + t.left_start + row;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float most = sums[i][0];
#pragma unroll
    for (int j = 1; j < 8; ++j) most = fmaxf(most, sums[i][j]);
    some |= row + own_row(i) < t.left_count && most > own_floors[own_row(i)];
  }
  if (t.one_table == 2) {
    own_floors = floors + t.right_start + column;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float most = sums[0][j];
#pragma unroll
      for (int i = 1; i < 8; ++i) most = fmaxf(most, sums[i][j]);
      some |= column + own_column(j) < t.right_count && most > own_floors[own_column(j)];
    }
  }
  if (!some) return;
  for_own_pairs(sums, space, [&](int i, int j, float value) {
    const int r = row + i, c = column + j;
    if (!wanted(t, r, c)) return;
    const i64 own = t.left_start + r, other = t.right_start + c;
    if (value > floors[own])
      offer(counts, keys, capacity, overflow, own, value, t.right_first + c);
    if (t.one_table == 2 && value > floors[other])
      offer(counts, keys, capacity, overflow, other, value, t.left_first + r);
  });
}
#endif

#if FP_KEEP == 3
// Range: `ends` are the least and the greatest raw score as `ordered` numbers.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
walk_tiles(SIDES, u32* __restrict__ ends) {
  BEGIN_TILE
  u32 least = 0xffffffffu, greatest = 0;
  for_own_pairs(sums, space, [&](int i, int j, float raw) {
    if (!wanted(t, row + i, column + j)) return;
    const u32 value = ordered(raw);
    least = value < least ? value : least;
    greatest = value > greatest ? value : greatest;
  });
#pragma unroll
  for (int apart = 16; apart > 0; apart >>= 1) {
    const u32 low = __shfl_xor_sync(0xffffffffu, least, apart);
    const u32 high = __shfl_xor_sync(0xffffffffu, greatest, apart);
    least = low < least ? low : least;
    greatest = high > greatest ? high : greatest;
  }
  if ((threadIdx.x & 31) == 0) {
    atomicMin(&ends[0], least);
    atomicMax(&ends[1], greatest);
  }
}
#endif

#if FP_KEEP == 4
// Histogram: raw scores are looked up in `cells`, the bins of equal steps of the raw score from
// `start` on, `steps` to one, -1 where a step with the tile's error reaches over an edge: such pairs
// are listed.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
walk_tiles(SIDES, const int* __restrict__ cells, int cell_count, float start, float steps,
               u64* __restrict__ counts, int bins, LIST) {
  MAKE_LIST
  __shared__ u32 own[SHARED_BINS];
  const bool shared = bins <= SHARED_BINS;
  for (int bin = threadIdx.x; bin < SHARED_BINS; bin += THREADS) own[bin] = 0;
  BEGIN_TILE
  __syncthreads();
  for_own_pairs(sums, space, [&](int i, int j, float raw) {
    const int r = row + i, c = column + j;
    if (!wanted(t, r, c)) return;
    const float cell = fminf(fmaxf((raw - start) * steps, 0.0f), (float)(cell_count - 1));
    const int bin = cells[(int)cell];
    if (bin < 0) append(list, atomicAdd(list.count, (u64)1), t.left_start + r, t.right_start + c);
    else if (shared) atomicAdd(&own[bin], 1u);
    else atomicAdd(&counts[bin], (u64)1);
  });
  __syncthreads();
  for (int bin = threadIdx.x; shared && bin < bins; bin += THREADS)
    if (own[bin]) atomicAdd(&counts[bin], (u64)own[bin]);
}
#endif
