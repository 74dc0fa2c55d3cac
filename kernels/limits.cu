// What a device can do at most: probes whose rates stand beside those of the kernels that score.
//
// Sums go into `sink` where they have a value that they do not have: nothing may be left out as
// unused.

// Copies vectors of 16 bytes; four are under way in each thread.
extern "C" __global__ void __launch_bounds__(256, 2)
copy_vectors(const uint4* __restrict__ source, uint4* __restrict__ target, long long count) {
  const long long step = (long long)gridDim.x * blockDim.x;
  long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; n + 3 * step < count; n += 4 * step) {
    const uint4 a = source[n], b = source[n + step];
    const uint4 c = source[n + 2 * step], d = source[n + 3 * step];
    target[n] = a;
    target[n + step] = b;
    target[n + 2 * step] = c;
    target[n + 3 * step] = d;
  }
  for (; n < count; n += step) target[n] = source[n];
}

// Reads the rows `order` (count,) of a table whose rows have `lines` lines of 64 bytes; four
// threads read a row.
extern "C" __global__ void __launch_bounds__(256, 2)
gather_rows(const uint4* __restrict__ rows, const int* __restrict__ order,
            unsigned* __restrict__ sink, long long count, int lines) {
  const long long step = (long long)gridDim.x * (blockDim.x / 4);
  const int lane = threadIdx.x % 4;
  unsigned sum = 0;
  for (long long n = (long long)blockIdx.x * (blockDim.x / 4) + threadIdx.x / 4; n < count;
       n += step) {
    const uint4* row = rows + (long long)order[n] * lines * 4 + lane;
#pragma unroll 8
    for (int line = 0; line < lines; ++line) {
      const uint4 v = row[line * 4];
      sum += (v.x ^ v.y) + (v.z ^ v.w);
    }
  }
  if (sum == 0x9e3779b9u) sink[0] = sum;
}

// Eight chains of float32 multiply-adds a thread, in registers.
extern "C" __global__ void __launch_bounds__(256, 2)
multiply_add(float* __restrict__ sink, int rounds, float factor, float shift) {
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = (float)(threadIdx.x + i);
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = fmaf(x[i], factor, shift);
  }
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[i];
  if (sum == 1234567.0f) sink[0] = sum;
}

// Four chains of bfloat16 matrix products (16 x 16 times 16 x 8) a warp, in registers.
extern "C" __global__ void __launch_bounds__(256, 2)
matrix_product(float* __restrict__ sink, int rounds, unsigned ones) {
  unsigned a[4] = {ones, ones, ones, ones}, b[2] = {ones, ones};
  float d[4][4] = {};
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#ifdef FP_HOST
      float c[4] = {d[i][0], d[i][1], d[i][2], d[i][3]};
      simulated::mma_m16n8k16_bf16(d[i], a, b, c, __LINE__);
#else
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
    }
  }
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  if (sum == -1.0f) sink[0] = sum;
}
