// Raw scores of 128 left rows against right rows, in the registers of a block: what walks all pairs
// begins with (tiles.cu, attention.cu). Operands are those of operands.py, rows one after another:
// product columns (bfloat16: two a word), then maxima to add, then maxima to subtract, each kind a
// multiple of 16 columns.
//   FP_FORM         0 products of float32, one chain of fmaf over the columns in order, the bits of
//                     the CPU's tile; 1 products of bfloat16 by tensor cores
//   FP_OWN_COLUMNS  right rows of a tile that a thread holds: 8 (128 in all), or 4 in form 0

#ifndef FP_OWN_COLUMNS
#define FP_OWN_COLUMNS 8
#endif
#define TILE 128                 // left rows; COLUMNS: right rows
#define COLUMNS (16 * FP_OWN_COLUMNS)
#define THREADS 256
#define STEP 16                  // float32 columns, or words of two bfloat16, brought in together
#define PITCH (TILE + 4)         // float32 of a column of left rows in shared memory
#define COLUMN_PITCH (COLUMNS + 4)  // and of right rows
#define WORD_PITCH (STEP + 4)    // words of a row: lanes of a fragment then meet different banks

struct Tiles {                   // what a launch walks; by value
  i64 left_first, right_first;   // table rows of its first left and right row: what a pair is called
  int left_start, right_start;   // the same in the tables on the device: what lists of pairs hold
  int left_count, right_count;
  int row_words, products, plus, minus;  // words of a row in all and of each kind
  int row_tiles, column_tiles;
  int one_table;                 // 0 two tables; 1 one: the diagonal is left out; 2 only columns > row
  float constant;
};

// --- which pairs a thread holds ------------------------------------------------------------------

// A thread holds 8 rows times FP_OWN_COLUMNS columns of the tile.
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

// Numbers of a thread's rows (or columns) of one column of operands in shared memory.
template <int COUNT>
__device__ __forceinline__ void own_values(
    const float* column, bool rows, float (&values)[COUNT]) {
#if FP_FORM == 1
#pragma unroll
  for (int n = 0; n < COUNT; ++n) values[n] = column[rows ? own_row(n) : own_column(n)];
#else
#pragma unroll
  for (int n = 0; n < COUNT; n += 4) {
    const float4 four = *(const float4*)(column + (rows ? own_row(n) : own_column(n)));
    values[n] = four.x; values[n + 1] = four.y; values[n + 2] = four.z; values[n + 3] = four.w;
  }
#endif
}

// --- operands into shared memory -----------------------------------------------------------------

// STEP columns of float32 of ROWS rows, turned: shared[column][row]. Rows past the end are zero.
template <int ROWS>
__device__ __forceinline__ void bring_columns(
    const u32* __restrict__ words, int first, int count, int row_words, int column,
    float* shared) {
#pragma unroll
  for (int n = 0; n < ROWS * STEP / 4 / THREADS; ++n) {
    const int place = threadIdx.x + n * THREADS, row = place >> 2, four = (place & 3) * 4;
    uint4 piece = {0, 0, 0, 0};
    if (first + row < count)
      piece = __ldg((const uint4*)(words + (i64)(first + row) * row_words + column + four));
    shared[(four + 0) * (ROWS + 4) + row] = __uint_as_float(piece.x);
    shared[(four + 1) * (ROWS + 4) + row] = __uint_as_float(piece.y);
    shared[(four + 2) * (ROWS + 4) + row] = __uint_as_float(piece.z);
    shared[(four + 3) * (ROWS + 4) + row] = __uint_as_float(piece.w);
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
    const float* left, const float* right, float (&sums)[8][FP_OWN_COLUMNS]) {
#pragma unroll 2  // more of them would want more registers than there are
  for (int k = 0; k < STEP; ++k) {
    float x[8], y[FP_OWN_COLUMNS];
    own_values(left + k * PITCH, true, x);
    own_values(right + k * COLUMN_PITCH, false, y);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < FP_OWN_COLUMNS; ++j) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
  }
}
#endif

// Two columns at a time, whose maxima are added first: a pair then has the same bits both ways
// round, where mirrored halves lie side by side.
__device__ __forceinline__ void add_maxima(
    const float* left, const float* right, bool plus, float (&sums)[8][FP_OWN_COLUMNS]) {
#pragma unroll 1
  for (int k = 0; k < STEP; k += 2) {
    float y[2][FP_OWN_COLUMNS];
    own_values(right + k * COLUMN_PITCH, false, y[0]);
    own_values(right + (k + 1) * COLUMN_PITCH, false, y[1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // one row at a time: all of them do not fit the registers
      const float x = left[k * PITCH + own_row(i)], next = left[(k + 1) * PITCH + own_row(i)];
#pragma unroll
      for (int j = 0; j < FP_OWN_COLUMNS; ++j) {
        const float pair = fmaxf(x, y[0][j]) + fmaxf(next, y[1][j]);
        sums[i][j] = plus ? sums[i][j] + pair : sums[i][j] - pair;
      }
#if FP_OWN_COLUMNS == 4
      __syncwarp();  // beside sums of values a compiler that takes up two rows spills
#endif
    }
  }
}

__device__ __forceinline__ void sum_tile(
    const u32* __restrict__ left, const float* __restrict__ left_bias,
    const u32* __restrict__ right, const float* __restrict__ right_bias, const Tiles& t,
    int row, int column, u32* space, float (&sums)[8][FP_OWN_COLUMNS]) {
  float* lefts = (float*)space;
  float* rights = lefts + STEP * PITCH;
#pragma unroll
  for (int j = 0; j < FP_OWN_COLUMNS; ++j) {
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
    for (int j = 0; j < FP_OWN_COLUMNS; ++j) sums[i][j] = (bias + sums[i][j]) + t.constant;
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
    bring_columns<TILE>(left, row, t.left_count, t.row_words, word, lefts);
    bring_columns<COLUMNS>(right, column, t.right_count, t.row_words, word, rights);
    __syncthreads();
    add_products(lefts, rights, sums);
#endif
    __syncthreads();
  }
#pragma unroll 1
  for (int word = t.products; word < t.row_words; word += STEP) {
    bring_columns<TILE>(left, row, t.left_count, t.row_words, word, lefts);
    bring_columns<COLUMNS>(right, column, t.right_count, t.row_words, word, rights);
    __syncthreads();
    if (word < t.products + t.plus)
      add_maxima(lefts, rights, true, sums);
    else
      add_maxima(lefts, rights, false, sums);
    __syncthreads();
  }
}
