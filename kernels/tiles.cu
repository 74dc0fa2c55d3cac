// All pairs: raw scores of 128 left rows against 128 right rows in the registers of a block, and
// what becomes of them before they are gone. Compiled with
//   FP_FORM  see tile.cuh
//   FP_KEEP  0 dense: scores are written; 1 hits: pairs that reach a floor are listed; 2 best: pairs
//              above the floor of their row become its candidates; 3 the range of all raw scores;
//              4 a histogram of them
//   FP_LINK  the link, as a number of LINKS; only dense scores go through it

#define STRIP 16                 // row tiles that are walked together, so that columns are read once
#define SPACE (32 * THREADS)     // words of shared memory: operands, then half of the values
#define SHARED_BINS 1024

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
