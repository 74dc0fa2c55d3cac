// The best of each row: candidates of a row are 64-bit keys (`key_of`), greater for a greater value,
// then for a lower column, `capacity` to a row. Lists of pairs are made for the pair kernel, and its
// scores are put back. Compiled with FP_CAPACITY, a power of two; only `keep_best` depends on it.

#ifndef FP_CAPACITY
#define FP_CAPACITY 1024
#endif
#define THREADS 256

__device__ __forceinline__ i64 this_thread() {
  return (i64)blockIdx.x * THREADS + threadIdx.x;
}

// Sort, the greatest first: all threads of the block, a bitonic network.
__device__ __forceinline__ void sort_shared(u64* keys) {
  for (int run = 2; run <= FP_CAPACITY; run <<= 1)
    for (int apart = run >> 1; apart > 0; apart >>= 1) {
      for (int n = threadIdx.x; n < FP_CAPACITY; n += THREADS) {
        const int other = n ^ apart;
        if (other > n) {
          const u64 x = keys[n], y = keys[other];
          if (((n & run) == 0) == (x < y)) { keys[n] = y; keys[other] = x; }
        }
      }
      __syncthreads();
    }
}

// Keep the best `keep` keys of each row, one block a row. Rows that have no more keep all, as they
// are, unless `all` rows are to be sorted. A row that holds `keep` keys gets the least value among
// them as its floor: nothing below it can be among its best. `kept` is what `counts` becomes.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
keep_best(u64* __restrict__ keys, u32* __restrict__ counts, u32* __restrict__ kept,
          float* __restrict__ floors, int keep, int all) {
  __shared__ u64 own[FP_CAPACITY];
  const i64 row = blockIdx.x;
  const int count = (int)counts[row];   // the caller has seen to it that none was without room
  __syncthreads();                      // before the first thread changes it
  if (count < keep && !all) {
    if (threadIdx.x == 0) kept[row] = (u32)count;
    return;
  }
  for (int n = threadIdx.x; n < FP_CAPACITY; n += THREADS)
    own[n] = n < count ? keys[row * FP_CAPACITY + n] : 0;
  __syncthreads();
  sort_shared(own);
  const int left = count < keep ? count : keep;
  for (int n = threadIdx.x; n < left; n += THREADS) keys[row * FP_CAPACITY + n] = own[n];
  if (threadIdx.x != 0) return;
  counts[row] = kept[row] = (u32)left;
  if (left == keep) floors[row] = value_of(own[keep - 1]);
}

// Forget what was appended since `keep_best`.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
forget_appended(u32* __restrict__ counts, const u32* __restrict__ kept, i64 rows) {
  const i64 row = this_thread();
  if (row < rows) counts[row] = kept[row];
}

// Begin: no candidate, every number passes the floor.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
begin_rows(u32* __restrict__ counts, u32* __restrict__ kept, float* __restrict__ floors, i64 rows) {
  const i64 row = this_thread();
  if (row >= rows) return;
  counts[row] = kept[row] = 0;
  floors[row] = __uint_as_float(0xff800000u);
}

// List the candidates of each row as pairs, `keep` to a row: row `left_start` + row and the column
// within a chunk of right rows. Where there is none in the chunk, the pair is (0, 0).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
list_candidates(const u64* __restrict__ keys, const u32* __restrict__ counts, i64 rows,
                int capacity, int keep, int left_start, i64 first, i64 last,
                int* __restrict__ list_left, int* __restrict__ list_right) {
  const i64 place = this_thread();
  if (place >= rows * keep) return;
  const i64 row = place / keep, n = place - row * keep;
  const i64 column = n < counts[row] ? (i64)column_of(keys[row * capacity + n]) : -1;
  const bool here = column >= first && column < last;
  list_left[place] = here ? left_start + (int)row : 0;
  list_right[place] = here ? (int)(column - first) : 0;
}

// Put the scores of `list_candidates` into the keys.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
rescore_candidates(u64* __restrict__ keys, const u32* __restrict__ counts, i64 rows,
                   int capacity, int keep, i64 first, i64 last,
                   const float* __restrict__ scores) {
  const i64 place = this_thread();
  if (place >= rows * keep) return;
  const i64 row = place / keep, n = place - row * keep;
  if (n >= counts[row]) return;
  u64* key = keys + row * capacity + n;
  const u32 column = column_of(*key);
  if ((i64)column >= first && (i64)column < last) *key = key_of(scores[place], column);
}

// Copy the first `keep` keys of each row together, 0 where a row has fewer.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
gather_best(const u64* __restrict__ keys, const u32* __restrict__ counts, i64 rows,
            int capacity, int keep, u64* __restrict__ best) {
  const i64 place = this_thread();
  if (place >= rows * keep) return;
  const i64 row = place / keep, n = place - row * keep;
  best[place] = n < counts[row] ? keys[row * capacity + n] : 0;
}

// --- every pair of some rows, by the pair kernel -------------------------------------------------

// List each of some rows with `width` right rows from `start` on.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
list_rows(const int* __restrict__ chosen, i64 rows, int start, int width,
          int* __restrict__ list_left, int* __restrict__ list_right) {
  const i64 place = this_thread();
  if (place >= rows * width) return;
  const i64 row = place / width;
  list_left[place] = chosen[row];
  list_right[place] = start + (int)(place - row * width);
}

// Offer the scores of `list_rows`, columns from `first` on, to the candidates of the rows. `itself`
// is the table row of device row 0 where left and right are one table, else far below any.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
offer_scores(const float* __restrict__ scores, const int* __restrict__ chosen, i64 rows, int width,
             i64 first, i64 itself, const float* __restrict__ floors, u32* __restrict__ counts,
             u64* __restrict__ keys, int capacity, u32* __restrict__ overflow) {
  const i64 place = this_thread();
  if (place >= rows * width) return;
  const i64 row = place / width, column = first + (place - row * width);
  if (!(scores[place] > floors[row]) || itself + chosen[row] == column) return;
  const u32 at = atomicAdd(&counts[row], 1u);
  if (at < (u32)capacity) keys[row * capacity + at] = key_of(scores[place], (u32)column);
  else atomicMax(overflow, 1u);
}

// Put the scores of `list_rows` as keys into rows of `length`, from column `first` on.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
lay_keys(const float* __restrict__ scores, const int* __restrict__ chosen, i64 rows, int width,
         i64 first, i64 itself, u64* __restrict__ keys, i64 length) {
  const i64 place = this_thread();
  if (place >= rows * width) return;
  const i64 row = place / width, column = first + (place - row * width);
  const bool same = itself + chosen[row] == column;
  keys[row * length + column] = same ? 0 : key_of(scores[place], (u32)column);
}

// One step of a bitonic network over rows of `length` keys, a power of two, the greatest first.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
sort_step(u64* __restrict__ keys, i64 couples, i64 length, i64 run, i64 apart) {
  const i64 place = this_thread();              // of a couple; length / 2 of them are a row's
  if (place >= couples) return;
  const i64 n = 2 * place - (place & (apart - 1));  // apart is a power of two
  const u64 x = keys[n], y = keys[n + apart];
  if (((n & (length - 1) & run) == 0) == (x < y)) { keys[n] = y; keys[n + apart] = x; }
}

// Put scores of listed pairs into a dense matrix; of a triangle, at both places.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
put_scores(const int* __restrict__ rows, const int* __restrict__ columns,
           const float* __restrict__ scores, i64 count, int both, float* __restrict__ matrix,
           i64 pitch) {
  const i64 place = this_thread();
  if (place >= count) return;
  const i64 r = rows[place], c = columns[place];
  matrix[r * pitch + c] = scores[place];
  if (both) matrix[c * pitch + r] = scores[place];
}
